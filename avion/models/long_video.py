"""Features of one clip of thousands of frames, in bounded memory, for inference.

The letters of the shapes are those of transformer.py; there is one clip, B = 1. The residual stream, tokens (1, N, T,
D), must be in memory as a whole; there is one copy, which is changed in place. Everything else is computed for some
tokens at a time, at most `max_tokens`: time mixing sees the whole sequence, for some patches ("rows") at a time; patch
embedding, space attention and MLP see some frames. The results are those of `model.encode_image`, up to the order of
sums.

    tower                    memory beside the stream
    divided, vanilla         nothing: the tokens after time mixing take the place of the tokens
    divided, frozen          the tokens after time mixing, in the autocast dtype
    divided, vim_spacetime   as vanilla or frozen; the scan walks N·T steps in pieces that hand on their state
    lavila                   the tokens after time mixing, in the autocast dtype
    joint                    keys and values of all tokens, in the autocast dtype

The stream has the dtype that the plain forward pass has between its blocks: float32 under autocast.
"""

import torch

from avion.errors import UserError

from .clip import CLIP, VideoClassifier
from .config import ModelConfig
from .stream import FrameReader, embed_frames
from .tower import find_tower, tower_of, towers


def default_max_tokens(device: torch.device | str) -> int:
    """Return how many tokens are computed at a time: enough to keep a GPU busy, and few on a CPU, where new memory is
    slow.
    """
    return 4_096 if torch.device(device).type == "cpu" else 32_768


@torch.inference_mode()
def encode_long_video(
    model: CLIP | VideoClassifier, read: FrameReader, num_frames: int, *, max_tokens: int | None = None
) -> torch.Tensor:
    """Compute `model.encode_image` of one clip of any number of frames.

    Args:
        model: A model in evaluation mode.
        read: Returns the frames [start, stop) of the clip, normalised, (C, stop - start, height, width) float on the
            model's device. It is called for a few frames at a time, and twice for the first frame only.
        num_frames: T.
        max_tokens: How many tokens are computed at a time; the default depends on the device. A row or a frame of more
            tokens is computed alone.

    Returns:
        The embedding, (E,).

    Raises:
        ValueError: The model is in training mode.
        UserError: The model's tower is not registered, or has no walk over long videos.
    """
    if model.training:
        raise ValueError("encode_long_video: the model is in training mode; call model.eval()")
    tower = tower_of(model.visual)
    if tower is None or tower.stem is None or tower.walk is None:
        known = ", ".join(t.module.__name__ for t in towers() if t.walk is not None)
        raise UserError(f"{type(model.visual).__name__}: no forward for long videos is known for it, only for {known}")
    max_tokens = max_tokens or default_max_tokens(next(model.visual.parameters()).device)
    stream = embed_frames(tower.stem(model.visual), read, num_frames, max_tokens)
    return model.project(tower.walk(model.visual, stream))[0]


# ---- memory ------------------------------------------------------------------------------------

# The most bytes per channel of a token that is computed. The MLP needs most: 16 for its hidden layer before the
# activation, 16 for the hidden layer after it, 12 for its input, its norm and the attention before it. The rest is for
# the allocator.
_WORK_BYTES = 64


def memory_bytes(config: ModelConfig, num_frames: int, *, autocast: bool, max_tokens: int) -> dict[str, int]:
    """Return upper bounds of the memory that `encode_long_video` holds at once beside the model, in bytes.

    Args:
        config: The configuration of the model.
        num_frames: T.
        autocast: Whether autocast computes in a dtype of 2 bytes.
        max_tokens: How many tokens are computed at a time.

    Returns:
        `stream`: 4·N·T·D. `beside`: what the module's docstring lists, 2 or 4 bytes per element. `work`: 64·D for each
            token that is computed at a time, of which there are `max_tokens`, or those of one row or frame.
    """
    patches = (config.img_size // config.patch_size) ** 2
    elements = patches * num_frames * config.embed_dim
    small = 2 if autocast else 4
    tower = find_tower(config.tower)
    beside = elements * (small if tower is None else tower.bytes_beside(config, small))
    in_work = max(max_tokens, num_frames, 1 + patches)
    return {"stream": 4 * elements, "beside": beside, "work": _WORK_BYTES * config.embed_dim * in_work}
