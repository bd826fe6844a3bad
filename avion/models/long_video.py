"""Features of one clip of thousands of frames, in bounded memory. Inference only.

Letters as in transformer.py; there is one clip, B = 1. What has to be there at once is the residual stream, tokens
(1, N, T, D), kept once and changed in place. All else is done for some of it at a time, at most `max_tokens` tokens:
time mixing sees the whole sequence, for some patches ("rows") at a time; patch embedding, space attention and MLP see
some frames. Results are those of `model.encode_image`, up to the order of sums.

    tower                    beside the stream
    divided, vanilla         nothing: the tokens after time mixing take the place of the tokens
    divided, frozen          the tokens after time mixing, in the autocast dtype
    divided, vim_spacetime   the same; the scan walks N·T steps in pieces that hand on their state
    lavila                   the same
    joint                    keys and values of all tokens, in the autocast dtype

The stream's dtype is what the plain forward has between its blocks: float32 under autocast.
"""

import torch

from avion.errors import UserError

from .clip import CLIP, VideoClassifier
from .config import ModelConfig
from .stream import FrameReader, embed_frames
from .tower import find_tower, tower_of, towers


def default_max_tokens(device: torch.device | str) -> int:
    """Tokens in work at a time: enough to keep a GPU busy, few for a CPU, to which fresh memory is dear."""
    return 4_096 if torch.device(device).type == "cpu" else 32_768


@torch.inference_mode()
def encode_long_video(
    model: CLIP | VideoClassifier, read: FrameReader, num_frames: int, *, max_tokens: int | None = None
) -> torch.Tensor:
    """`model.encode_image` of one clip of any number of frames, (E,).

    read(start, stop): frames [start, stop) of the clip, normalised, (C, stop - start, height, width) float on the
    model's device; called for a few frames at a time, twice for none but the first. max_tokens: tokens in work at a
    time (default: by device); a row or a frame of more is taken alone. The model must be in evaluation mode.
    Raises UserError for a tower that is none of the project's.
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

# Bytes per token in work and channel, at most: of the MLP, the widest moment, 16 for its hidden layer before the
# activation and 16 after it, 12 for its input, norm and the attention before it; the rest is for the allocator.
_WORK_BYTES = 64


def memory_bytes(config: ModelConfig, num_frames: int, *, autocast: bool, max_tokens: int) -> dict[str, int]:
    """Upper bounds of what `encode_long_video` holds at once beside the model, by part.

    autocast: to a type of 2 bytes. Parts: `stream`, 4·N·T·D; `beside`, as in the module's docstring, 2 or 4 bytes;
    `work`, 64·D for each token in work, of which there are `max_tokens` or one row or frame.
    """
    patches = (config.img_size // config.patch_size) ** 2
    elements = patches * num_frames * config.embed_dim
    small = 2 if autocast else 4
    tower = find_tower(config.tower)
    beside = elements * (small if tower is None else tower.bytes_beside(config, small))
    in_work = max(max_tokens, num_frames, 1 + patches)
    return {"stream": 4 * elements, "beside": beside, "work": _WORK_BYTES * config.embed_dim * in_work}
