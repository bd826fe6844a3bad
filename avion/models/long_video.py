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

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from avion.errors import UserError

from .lavila import DividedAttention, LaViLaTower
from .model_clip import CLIP
from .registry import ModelConfig
from .timemamba import DividedBlock, DividedTower
from .transformer import Attention, JointViT, ResidualBlock, attend, embed_patches, patch_grid, project, split_heads
from .utils import resize_position_embed, resize_temporal_embed

FrameReader = Callable[[int, int], torch.Tensor]


def default_max_tokens(device: torch.device | str) -> int:
    """Tokens in work at a time: enough to keep a GPU busy, few for a CPU, to which fresh memory is dear."""
    return 4_096 if torch.device(device).type == "cpu" else 32_768


@torch.inference_mode()
def encode_long_video(
    model: CLIP, read: FrameReader, num_frames: int, *, max_tokens: int | None = None
) -> torch.Tensor:
    """`model.encode_image` of one clip of any number of frames, (E,).

    read(start, stop): frames [start, stop) of the clip, normalised, (C, stop - start, height, width) float on the
    model's device; called for a few frames at a time, twice for none but the first. max_tokens: tokens in work at a
    time (default: by device); a row or a frame of more is taken alone. The model must be in evaluation mode.
    Raises UserError for a tower that is none of the project's.
    """
    if model.training:
        raise ValueError("encode_long_video: the model is in training mode; call model.eval()")
    tower = model.visual
    run = next((run for kind, run in _TOWERS.items() if isinstance(tower, kind)), None)
    if run is None:
        known = ", ".join(kind.__name__ for kind in _TOWERS)
        raise UserError(f"{type(tower).__name__}: no forward for long videos is known for it, only for {known}")
    max_tokens = max_tokens or default_max_tokens(next(tower.parameters()).device)
    features = run(tower, _embed(_stem(tower), read, num_frames, max_tokens))  # (1, D)
    # LaViLa's model keeps the projection, the other towers do.
    projection = tower.image_projection if hasattr(tower, "image_projection") else model.image_projection
    return project(features, projection)[0]


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
    beside = small * elements
    if config.tower == "joint":
        beside *= 2
    elif config.tower == "divided" and config.residual == "vanilla":
        beside = 4 * elements if config.mixer == "vim_spacetime" else 0
    in_work = max(max_tokens, num_frames, 1 + patches)
    return {"stream": 4 * elements, "beside": beside, "work": _WORK_BYTES * config.embed_dim * in_work}


# ---- pixels to tokens --------------------------------------------------------------------------


class _Stem(NamedTuple):
    """What stands before a tower's blocks; its towers name these differently."""

    conv: nn.Conv2d
    fast: bool
    cls: torch.Tensor  # (1, 1, D)
    position: torch.Tensor  # (1, 1+N, D)
    temporal: torch.Tensor | None  # (1, T, D)
    norm: nn.LayerNorm


def _stem(tower: nn.Module) -> _Stem:
    if isinstance(tower, JointViT):
        cls, position = tower.class_embedding[None, None], tower.positional_embedding[None]
        return _Stem(tower.conv1, tower.use_fast_conv1, cls, position, tower.temporal_embedding[None], tower.ln_pre)
    conv = tower.patch_embed.proj
    return _Stem(conv, tower.use_fast_conv1, tower.cls_token, tower.pos_embed, tower.temporal_embed, tower.ln_pre)


class _Stream(NamedTuple):
    cls: torch.Tensor  # (1, 1, D)
    tokens: torch.Tensor  # (1, N, T, D), patch-major, changed in place
    max_tokens: int

    def rows(self) -> Iterator[slice]:
        """The patches, some at a time."""
        return _pieces(self.tokens.shape[1], self.max_tokens // self.tokens.shape[2])

    def frames(self) -> Iterator[slice]:
        """The frames, some at a time."""
        return _pieces(self.tokens.shape[2], self.max_tokens // (1 + self.tokens.shape[1]))

    def beside(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Room for as many tokens again, by default in the autocast dtype."""
        return torch.empty_like(self.tokens, dtype=dtype or _compute_dtype(self.tokens))


def _pieces(total: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _embed(stem: _Stem, read: FrameReader, num_frames: int, max_tokens: int) -> _Stream:
    grid = patch_grid(read(0, 1)[None], stem.conv.kernel_size[0])
    position = resize_position_embed(stem.position, grid)  # (1, 1+N, D)
    temporal = None if stem.temporal is None else resize_temporal_embed(stem.temporal, num_frames)  # (1, T, D)
    tokens = None
    for f in _pieces(num_frames, max_tokens // position.shape[1]):
        x = embed_patches(read(f.start, f.stop)[None], stem.conv, stem.fast)  # (1, N, t, D)
        x = x + position[:, 1:, None]
        if temporal is not None:
            x = x + temporal[:, f]
        x = stem.norm(x)
        if tokens is None:
            tokens = x.new_empty(1, x.shape[1], num_frames, x.shape[3])
        tokens[:, :, f] = x
    return _Stream(stem.norm(stem.cls + position[:, :1]), tokens, max_tokens)


# ---- the divided towers ------------------------------------------------------------------------


def _divided(tower: DividedTower, stream: _Stream) -> torch.Tensor:
    """`tower.features`, (1, D)."""
    cls, tokens = stream.cls, stream.tokens
    first = tower.blocks[0]
    if first.residual == "frozen":
        mixed = stream.beside()
    else:
        mixed = stream.beside(tokens.dtype) if first.mixer == "vim_spacetime" else tokens
    for i, block in enumerate(tower.blocks):
        _mix_time(block, stream, mixed)
        cls = _mix_space(block, cls, stream, mixed, is_last=i == len(tower.blocks) - 1)
    return tower.norm(cls[:, 0])


def _mix_time(block: DividedBlock, stream: _Stream, mixed: torch.Tensor) -> None:
    """mixed ← tokens + tanh(α) · what time mixing gives; it may be the tokens themselves."""
    tokens, gate = stream.tokens, torch.tanh(block.alpha_timeattn)
    if block.mixer != "vim_spacetime":
        for n in stream.rows():
            mixed[:, n] = torch.addcmul(tokens[:, n], block.mix_time(block.norm3(tokens[:, n])), gate)
        return
    steps, out = tokens.flatten(1, 2), mixed.flatten(1, 2)  # (1, N·T, D), views
    pieces, carry = list(_pieces(steps.shape[1], stream.max_tokens)), None
    for p in reversed(pieces):
        out[:, p], carry = block.time_mamba.scan_piece(block.norm3(steps[:, p]), carry, reverse=True)
    carry = None
    for p in pieces:
        forward, carry = block.time_mamba.scan_piece(block.norm3(steps[:, p]), carry, reverse=False)
        out[:, p] = torch.addcmul(steps[:, p], forward + out[:, p], gate)


def _mix_space(
    block: DividedBlock, cls: torch.Tensor, stream: _Stream, mixed: torch.Tensor, is_last: bool
) -> torch.Tensor:
    """Space attention and MLP of some frames after the others; the tokens are replaced. Returns the new CLS."""
    tokens, total = stream.tokens, torch.zeros_like(cls)
    for f in stream.frames():
        r = mixed[:, :, f].to(tokens.dtype)
        of_frames, space = block.mix_space_of_frames(block.norm1(cls), block.norm1(r))
        total += of_frames.sum(dim=1, keepdim=True, dtype=total.dtype)
        if not is_last:
            x = (tokens[:, :, f] if block.residual == "frozen" else r) + space
            tokens[:, :, f] = x + block.mlp(block.norm2(x))
    cls = cls + total / tokens.shape[2]
    return cls + block.mlp(block.norm2(cls))


# ---- LaViLa's tower ----------------------------------------------------------------------------


def _lavila(tower: LaViLaTower, stream: _Stream) -> torch.Tensor:
    """`tower.features`, (1, D)."""
    cls, tokens, mixed = stream.cls, stream.tokens, stream.beside()
    for i, block in enumerate(tower.blocks):
        gate = 1.0 if block.alpha_timeattn is None else torch.tanh(block.alpha_timeattn)
        over_time = _AttentionWithCls(block.timeattn, block.norm3(cls))
        for n in stream.rows():
            mixed[:, n] = tokens[:, n] + gate * over_time(block.norm3(tokens[:, n])[0])[None]
        mixed_cls = cls + gate * over_time.cls()
        over_space = _AttentionWithCls(block.attn, block.norm1(mixed_cls))
        for f in stream.frames():
            frames = block.norm1(mixed[:, :, f].to(tokens.dtype))[0].transpose(0, 1)  # (t, N, D)
            space = over_space(frames).transpose(0, 1)[None]  # (1, N, t, D)
            if i < len(tower.blocks) - 1:
                x = tokens[:, :, f] + space
                tokens[:, :, f] = x + block.mlp(block.norm2(x))
        cls = cls + over_space.cls()
        cls = cls + block.mlp(block.norm2(cls))
    return tower.norm(cls[:, 0])


class _AttentionWithCls:
    """LaViLa's attention for some rows after the others: each of them sees itself and the CLS, the CLS sees all.

    The CLS's softmax goes over more keys than are ever there at once: kept are the largest score so far, the sum of
    exponentials relative to it and the sum of values weighted by them, per head.
    """

    def __init__(self, attn: DividedAttention, cls: torch.Tensor):
        self.attn = attn
        self.query, self.key, self.value = split_heads(attn.qkv(cls), attn.heads)  # (1, H, 1, d)
        self.dtype = torch.promote_types(self.query.dtype, torch.float32)
        heads, width = self.query.shape[1], self.query.shape[3]
        self.largest = self.query.new_full((heads, 1), float("-inf"), dtype=self.dtype)
        self.weights = self.query.new_zeros(heads, 1, dtype=self.dtype)
        self.values = self.query.new_zeros(heads, width, dtype=self.dtype)
        self._see(self.key, self.value)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows (R, S, D), normalised → (R, S, D)."""
        q, k, v = split_heads(self.attn.qkv(rows), self.attn.heads)  # (R, H, S, d)
        self._see(k, v)
        k, v = (
            torch.cat([of_cls.expand(len(rows), -1, -1, -1), own], dim=2)
            for of_cls, own in ((self.key, k), (self.value, v))
        )
        return self.attn.proj(attend(q, k, v, self.attn.use_flash))

    def _see(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys and values (R, H, S, d), all of them for the one query."""
        with torch.autocast(keys.device.type, enabled=False):
            query = self.query[0, :, 0].to(self.dtype) * keys.shape[-1] ** -0.5  # (H, d)
            scores = torch.einsum("hd,rhsd->hrs", query, keys.to(self.dtype)).flatten(1)  # (H, R·S)
            largest = torch.maximum(self.largest, scores.amax(dim=1, keepdim=True))
            old, new = torch.exp(self.largest - largest), torch.exp(scores - largest)
            self.weights = self.weights * old + new.sum(dim=1, keepdim=True)
            by_head = values.to(self.dtype).transpose(0, 1).flatten(1, 2)  # (H, R·S, d)
            self.values = self.values * old + (new[:, None] @ by_head)[:, 0]
            self.largest = largest

    def cls(self) -> torch.Tensor:
        """The CLS's own result once all rows have been, (1, 1, D)."""
        return self.attn.proj((self.values / self.weights).flatten()[None, None])


# ---- AVION's joint tower -----------------------------------------------------------------------


def _joint(tower: JointViT, stream: _Stream) -> torch.Tensor:
    """`tower.features`, (1, D). All tokens attend to all: memory is bounded, time grows with the square of T."""
    cls, steps = stream.cls, stream.tokens.flatten(1, 2)  # (1, N·T, D), a view; here their order does not matter
    blocks, count = tower.transformer.resblocks, 1 + steps.shape[1]
    heads, dtype = blocks[0].attn.heads, _compute_dtype(steps)
    keys, values = (steps.new_empty(1, heads, count, steps.shape[2] // heads, dtype=dtype) for _ in range(2))
    pieces = list(_pieces(steps.shape[1], stream.max_tokens))
    for i, block in enumerate(blocks):
        keys[:, :, :1], values[:, :, :1] = _in_heads(block.attn, block.ln_1(cls), 1, 3)
        for p in pieces:
            behind = slice(1 + p.start, 1 + p.stop)  # the CLS
            keys[:, :, behind], values[:, :, behind] = _in_heads(block.attn, block.ln_1(steps[:, p]), 1, 3)
        cls = _joint_block(block, cls, keys, values)
        if i < len(blocks) - 1:
            for p in pieces:
                steps[:, p] = _joint_block(block, steps[:, p], keys, values)
    return tower.ln_post(cls[:, 0])


def _joint_block(block: ResidualBlock, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The block for some tokens x (1, S, D), with keys and values (1, H, 1+N·T, d) of all."""
    (query,) = _in_heads(block.attn, block.ln_1(x), 0, 1)
    x = x + block.attn.out_proj(attend(query, keys, values, block.attn.use_flash))
    return x + block.mlp(block.ln_2(x))


def _in_heads(attn: Attention, x: torch.Tensor, first: int, stop: int) -> tuple[torch.Tensor, ...]:
    """Of queries (0), keys (1) and values (2) those in [first, stop), each (1, H, S, d)."""
    part, dim = slice(first * x.shape[-1], stop * x.shape[-1]), x.shape[-1]
    projected = F.linear(x, attn.Wqkv.weight[part], attn.Wqkv.bias[part])
    return tuple(y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in projected.split(dim, dim=-1))


_TOWERS = {DividedTower: _divided, LaViLaTower: _lavila, JointViT: _joint}
