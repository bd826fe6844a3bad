"""LaViLa's dual encoder (arXiv 2212.04501): a divided space-time tower whose blocks work on the whole sequence.

The letters of the shapes are those of transformer.py. The tokens x (B, 1+T·N, D) are frame-major after the CLS, "b (t
n) d". One block:

    t = timeattn(norm3(x)), times tanh(α) where the model is gated
    s = attn(norm1(x + t))
    x ← x + s;  x ← x + mlp(norm2(x))

Both attentions project all tokens through one qkv. The query of the CLS attends to every token of the clip. The query
of a patch attends to the CLS and to its own position in all frames (time), or to the CLS and its own frame (space).
"""

import re
from typing import Any, cast

import torch
from torch import nn

from .clip import CLIP
from .config import VIM_FIELDS, ModelConfig
from .registry import register_model
from .stream import Stem, Stream
from .tower import Layout, ShapeReader, Stack, Tower, Weights, clip_text_stack, register_tower, rename
from .transformer import (
    INIT_STD,
    DropPath,
    Mlp,
    PatchEmbed,
    TextTransformer,
    attend,
    drop_patches,
    drop_path_rates,
    embed_patches,
    encode_tokens,
    patch_grid,
    run_block,
    split_heads,
)
from .utils import resize_position_embed, resize_temporal_embed


class DividedAttention(nn.Module):
    """LaViLa's attention, x (B, 1+T·N, D) → the same shape; `over` is "time" or "space" and says with whom a patch
    attends.
    """

    def __init__(self, dim: int, heads: int, over: str, use_flash: bool | None):
        super().__init__()
        self.heads = heads
        self.over = over
        self.use_flash = use_flash
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads)  # (B, H, 1+T·N, d)
        cls_out = attend(q[:, :, :1], k, v, self.use_flash)  # (B, 1, D)

        rows_q = self.to_rows(q[:, :, 1:], frames)  # (R, H, S, d)
        groups = rows_q.shape[0] // x.shape[0]  # N in time, T in space
        rows_k, rows_v = (
            torch.cat(
                [y[:, None, :, :1].expand(-1, groups, -1, -1, -1).flatten(0, 1), self.to_rows(y[:, :, 1:], frames)], 2
            )
            for y in (k, v)
        )  # (R, H, 1+S, d)
        out = attend(rows_q, rows_k, rows_v, self.use_flash)  # (R, S, D)
        out = out.unflatten(0, (x.shape[0], groups))  # (B, N, T, D) in time, (B, T, N, D) in space
        out = (out.transpose(1, 2) if self.over == "time" else out).flatten(1, 2)  # (B, T·N, D)
        return self.proj(torch.cat([cls_out, out], dim=1))

    def to_rows(self, y: torch.Tensor, frames: int) -> torch.Tensor:
        """Rearrange (B, H, T·N, d) into the rows that attend: (B·N, H, T, d) in time, (B·T, H, N, d) in space."""
        y = y.unflatten(2, (frames, -1))  # (B, H, T, N, d)
        y = y.permute(0, 3, 1, 2, 4) if self.over == "time" else y.transpose(1, 2)
        return y.flatten(0, 1)


class LaViLaBlock(nn.Module):
    """One block: x (B, 1+T·N, D) → the same shape."""

    def __init__(self, config: ModelConfig, drop_path: float):
        super().__init__()
        dim, heads, use_flash = config.embed_dim, config.num_heads, config.use_flash_attn
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.timeattn = DividedAttention(dim, heads, "time", use_flash)
        self.alpha_timeattn = nn.Parameter(torch.full([], float(config.time_gate_init))) if config.gated_time else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DividedAttention(dim, heads, "space", use_flash)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, config.mlp_ratio, config.act_layer)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, frames: int, cls_only: bool = False) -> torch.Tensor:
        """Run the block. With `cls_only`, as in the last block, the MLP is computed for the CLS only, (B, 1, D)."""
        t = self.drop_path(self.timeattn(self.norm3(x), frames))
        if self.alpha_timeattn is not None:
            t = t * torch.tanh(self.alpha_timeattn)
        x = x + self.drop_path(self.attn(self.norm1(x + t), frames))
        if cls_only:
            x = x[:, :1]
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LaViLaTower(nn.Module):
    """LaViLa's tower: video (B, C, T, height, width) → (B, D). The projection belongs to the model, as in the
    checkpoints.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, patches = config.embed_dim, (config.img_size // config.patch_size) ** 2
        self.width = dim
        self.patch_dropout = config.patch_dropout
        self.use_fast_conv1 = config.use_fast_conv1
        self.grad_checkpointing = config.grad_checkpointing
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, dim))
        self.temporal_embed = nn.Parameter(torch.empty(1, config.num_frames, dim))
        self.ln_pre = nn.LayerNorm(dim, eps=1e-5)
        self.blocks = nn.ModuleList(LaViLaBlock(config, rate) for rate in drop_path_rates(config))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.image_projection: nn.Parameter | None = None  # `LaViLaCLIP` holds the projection
        self.init_parameters()

    def each_block(self) -> list[LaViLaBlock]:
        """Return the blocks from the first to the last."""
        return cast("list[LaViLaBlock]", list(self.blocks))

    def init_parameters(self) -> None:
        """Set LaViLa's initial values: time attention starts without effect (v = 0, and a projection of ones), and the
        other linear layers keep PyTorch's values.
        """
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
        nn.init.zeros_(self.temporal_embed)
        for block in self.each_block():
            for parameter in block.timeattn.parameters():
                nn.init.zeros_(parameter)
            nn.init.ones_(block.timeattn.proj.weight)

    def features(self, video: torch.Tensor) -> torch.Tensor:
        """Return the CLS after the last norm: (B, C, T, height, width) → (B, D)."""
        return self.norm(self.encode(video, cls_only=True)[:, 0])

    def token_features(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens after the last norm: (B, C, T, height, width) → CLS (B, D) and patches (B, N, T, D)."""
        x = self.norm(self.encode(video, cls_only=False))  # (B, 1+T·N, D)
        return x[:, 0], x[:, 1:].unflatten(1, (video.shape[2], -1)).transpose(1, 2)

    def encode(self, video: torch.Tensor, cls_only: bool) -> torch.Tensor:
        """Run all blocks: (B, C, T, height, width) → (B, 1+T·N, D), or (B, 1, D) with `cls_only`."""
        frames = video.shape[2]
        grid = patch_grid(video, self.patch_embed.proj.kernel_size[0])
        position = resize_position_embed(self.pos_embed, grid)  # (1, 1+N, D)
        temporal = resize_temporal_embed(self.temporal_embed, frames)  # (1, T, D)
        x = embed_patches(video, self.patch_embed.proj, self.use_fast_conv1)  # (B, N, T, D)
        x = x + position[:, 1:, None] + temporal
        if self.training and self.patch_dropout:
            x = drop_patches(x, self.patch_dropout)
        cls = (self.cls_token + position[:, :1]).expand(x.shape[0], -1, -1)  # (B, 1, D)
        x = self.ln_pre(torch.cat([cls, x.transpose(1, 2).flatten(1, 2)], dim=1))  # (B, 1+T·N, D)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, frames, cls_only and i == last, checkpointed=self.grad_checkpointing)
        return x

    forward = features


class LaViLaCLIP(CLIP):
    """LaViLa's model, whose checkpoints keep both projections and the parts of the text tower at the top."""

    def __init__(self, config: ModelConfig):
        super().__init__(LaViLaTower(config), None, config)
        text = TextTransformer(config)
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.transformer = text.transformer
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        self.image_projection = nn.Parameter(torch.empty(config.embed_dim, config.project_embed_dim))
        nn.init.normal_(self.image_projection, std=config.embed_dim**-0.5)

    def encode_image(self, video: torch.Tensor) -> torch.Tensor:
        return self.visual(video) @ self.image_projection

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return encode_tokens(self, tokens)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Project the tower's features (B, D) to the embedding that both towers share, (B, E)."""
        return features @ self.image_projection


def _stack(tower: LaViLaTower) -> Stack:
    before = [tower.patch_embed, tower.cls_token, tower.pos_embed, tower.temporal_embed, tower.ln_pre]
    return Stack(before, tower.each_block(), [tower.norm])


# ---- long videos --------------------------------------------------------------------------------


def _stem(tower: LaViLaTower) -> Stem:
    conv, position = tower.patch_embed.proj, tower.pos_embed
    return Stem(conv, tower.use_fast_conv1, tower.cls_token, position, tower.temporal_embed, tower.ln_pre)


def walk_lavila(tower: LaViLaTower, stream: Stream) -> torch.Tensor:
    """Compute `tower.features` of a long video, (1, D)."""
    cls, tokens, mixed = stream.cls, stream.tokens, stream.beside()
    blocks = tower.each_block()
    for i, block in enumerate(blocks):
        gate = 1.0 if block.alpha_timeattn is None else torch.tanh(block.alpha_timeattn)
        over_time = _AttentionWithCls(block.timeattn, block.norm3(cls))
        for n in stream.rows():
            mixed[:, n] = tokens[:, n] + gate * over_time(block.norm3(tokens[:, n])[0])[None]
        mixed_cls = cls + gate * over_time.cls()
        over_space = _AttentionWithCls(block.attn, block.norm1(mixed_cls))
        for f in stream.frames():
            frames = block.norm1(mixed[:, :, f].to(tokens.dtype))[0].transpose(0, 1)  # (t, N, D)
            space = over_space(frames).transpose(0, 1)[None]  # (1, N, t, D)
            if i < len(blocks) - 1:
                x = tokens[:, :, f] + space
                tokens[:, :, f] = x + block.mlp(block.norm2(x))
        cls = cls + over_space.cls()
        cls = cls + block.mlp(block.norm2(cls))
    return tower.norm(cls[:, 0])


class _AttentionWithCls:
    """LaViLa's attention, some rows at a time: each row sees itself and the CLS, and the CLS sees all rows.

    The softmax of the CLS goes over more keys than are ever in memory at once. Three things are kept per head: the
    largest score so far, the sum of exponentials relative to it, and the sum of values weighted by these exponentials.
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
        """Attend: normalised rows (R, S, D) → (R, S, D)."""
        q, k, v = split_heads(self.attn.qkv(rows), self.attn.heads)  # (R, H, S, d)
        self._see(k, v)
        k, v = (
            torch.cat([of_cls.expand(len(rows), -1, -1, -1), own], dim=2)
            for of_cls, own in ((self.key, k), (self.value, v))
        )
        return self.attn.proj(attend(q, k, v, self.attn.use_flash))

    def _see(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add keys and values (R, H, S, d) to the sums of the CLS, whose query is the only one."""
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
        """Return the result for the CLS once it has seen all rows, (1, 1, D)."""
        return self.attn.proj((self.values / self.weights).flatten()[None, None])


# ---- checkpoints --------------------------------------------------------------------------------

_LAYOUT = Layout(
    name="lavila",
    requires=("visual.blocks.0.attn.qkv.",),
    excludes=(),
    position="visual.pos_embed",
    patches="visual.patch_embed.proj.weight",
    blocks="visual.blocks.",
    text="",
    projection="image_projection",
    temporal="visual.temporal_embed",
    act_layer="quick_gelu",
    norm_style="openai_legacy",  # LaViLa trains with a mistyped mean of the red channel
)
_BLOCK = r"visual\.blocks\.\d+\."
_TEMPORAL = re.compile(rf"visual\.temporal_embed$|{_BLOCK}(?:norm3|timeattn|alpha_timeattn)")
_FROM_COMMON = (
    (r"(visual\.blocks\.\d+\.(?:time)?attn)\.Wqkv\.", r"\1.qkv."),
    (r"(visual\.blocks\.\d+\.(?:time)?attn)\.out_proj\.", r"\1.proj."),
    (r"visual\.image_projection$", "image_projection"),
    (r"textual\.", ""),
)
_TO_COMMON = (
    (r"(visual\.blocks\.\d+\.(?:time)?attn)\.qkv\.", r"\1.Wqkv."),
    (r"(visual\.blocks\.\d+\.(?:time)?attn)\.proj\.", r"\1.out_proj."),
    (r"image_projection$", "visual.image_projection"),
    (r"(?!visual\.|textual\.|logit_)", "textual."),
)


def _further_sizes(weights: Weights, shape: ShapeReader, width: int) -> dict[str, Any]:
    return {"gated_time": f"{_LAYOUT.blocks}0.alpha_timeattn" in weights}


def _ignored(config: ModelConfig) -> dict[str, str]:
    ignored = dict.fromkeys(VIM_FIELDS, "this model has no ViM mixer")
    if not config.gated_time:
        ignored["time_gate_init"] = "time attention has a gate only with gated_time=True"
    return ignored


# ---- registered ---------------------------------------------------------------------------------

register_tower(
    Tower(
        name="lavila",
        module=LaViLaTower,
        build=LaViLaCLIP,
        layout=_LAYOUT,
        ignored=_ignored,
        further_sizes=_further_sizes,
        from_common=lambda weights: rename(weights, _FROM_COMMON),
        to_common=lambda weights: rename(weights, _TO_COMMON),
        temporal=_TEMPORAL,
        time_from_lavila=lambda config: _TEMPORAL,
        video_stack=_stack,
        text_stack=clip_text_stack,  # the model itself holds the parts
        stem=_stem,
        walk=walk_lavila,
    )
)

register_model(
    ModelConfig("LAVILA_TSF_B16", "lavila", act_layer="quick_gelu"),
    aliases=("CLIP_OPENAI_TIMESFORMER_BASE",),
)
register_model(
    ModelConfig(
        "LAVILA_TSF_L14",
        "lavila",
        act_layer="quick_gelu",
        patch_size=14,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        text_width=768,
        text_heads=12,
    ),
    aliases=("CLIP_OPENAI_TIMESFORMER_LARGE",),
)
