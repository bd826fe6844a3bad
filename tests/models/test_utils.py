"""Resized embeddings against interpolation by hand."""

import pytest
import torch

from avion.errors import UserError
from avion.models.utils import inflate_positional_embeds, resize_position_embed, resize_temporal_embed

from .by_hand import bicubic_by_hand, linear_by_hand


def test_two_frames_from_four_are_means_of_pairs():
    embed = torch.tensor([[0.0], [2.0], [10.0], [30.0]])
    assert resize_temporal_embed(embed, 2).tolist() == [[1.0], [20.0]]
    assert resize_temporal_embed(embed[:2], 4).tolist() == [[0.0], [0.5], [1.5], [2.0]]


@pytest.mark.parametrize("frames", [1, 3, 4, 7, 16])
def test_temporal_embedding_is_resized_linearly(frames):
    embed = torch.randn(4, 6, dtype=torch.float64)
    wanted = torch.from_numpy(linear_by_hand(embed.numpy(), frames))
    torch.testing.assert_close(resize_temporal_embed(embed, frames), wanted)
    torch.testing.assert_close(resize_temporal_embed(embed[None], frames), wanted[None])


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (5, 2), (1, 4)])
def test_position_embedding_is_resized_bicubically(grid):
    embed = torch.randn(1 + 9, 6, dtype=torch.float64)
    patches = bicubic_by_hand(embed[1:].reshape(3, 3, 6).numpy(), *grid).reshape(-1, 6)
    wanted = torch.cat([embed[:1], torch.from_numpy(patches)])
    torch.testing.assert_close(resize_position_embed(embed, grid), wanted)
    torch.testing.assert_close(resize_position_embed(embed[None], grid), wanted[None])


def test_inflate_positional_embeds():
    old = torch.tensor([[0.0], [2.0]])
    model = {"visual.temporal_embedding": torch.zeros(4, 1), "visual.positional_embedding": torch.zeros(5, 1)}

    def inflate(how, frames=4):
        return inflate_positional_embeds(model, {"visual.temporal_embedding": old}, frames, how)[
            "visual.temporal_embedding"
        ].flatten()

    assert inflate("zeros").tolist() == [0, 2, 0, 0]
    assert inflate("bilinear").tolist() == [0, 0.5, 1.5, 2]
    assert inflate("interp").tolist() == [0, 0, 2, 2]
    # To fewer frames: the first ones, or all of them resized.
    assert inflate("zeros", 1).tolist() == [0] and inflate("bilinear", 1).tolist() == [1]
    with pytest.raises(UserError, match="load_temporal_fix"):
        inflate("cubic")
    with pytest.raises(UserError, match="load_checkpoint"):
        inflate_positional_embeds(model, {"visual.positional_embedding": torch.zeros(10, 1)})
    divided = {"visual.temporal_embed": torch.zeros(1, 2, 3)}
    assert inflate_positional_embeds(divided, dict(divided), 8)["visual.temporal_embed"].shape == (1, 8, 3)
