"""The divided space-time video tower and its five registered models (ID4 … ID8 of Table 8).

A block first mixes over time and then over space. Two choices make the five models:

    mixer      what mixes over time: "attention" or "vim" over the T frames of each patch,
               "vim_spacetime" over all N·T tokens of a clip; or a module of yours (register_mixer)
    residual   what the result is added to: "vanilla" (TimeSformer, arXiv 2102.05095) the tokens after
               time mixing, "frozen" (Frozen in Time, arXiv 2104.00650) the block's input

The letters of the shapes are those of transformer.py. Between blocks the CLS and the tokens are separate tensors,

    cls (B, 1, D)      tokens (B, N, T, D): patch-major, time fastest, "b (n t) d"

so that time mixing reads its rows (B·N, T, D) without a copy, and space attention needs one rearrangement into (B·T,
1+N, D) and none back.
"""

import math
import re
from typing import Any, cast

import torch
from torch import nn

from .clip import CLIP
from .config import VIM_FIELDS, ModelConfig
from .registry import build_mixer, register_model
from .stream import Stem, Stream, pieces
from .tower import Layout, ShapeReader, Stack, Tower, Weights, register_tower
from .transformer import (
    INIT_STD,
    Attention,
    DropPath,
    Mlp,
    PatchEmbed,
    TextTransformer,
    drop_patches,
    drop_path_rates,
    embed_patches,
    patch_grid,
    project,
    run_block,
)
from .utils import resize_position_embed, resize_temporal_embed
from .vim import BiMambaMixer

# ---- the block ---------------------------------------------------------------------------------


class DividedBlock(nn.Module):
    """One block: cls (B, 1, D) and tokens (B, N, T, D) → the same shapes."""

    def __init__(self, config: ModelConfig, drop_path: float):
        super().__init__()
        dim = config.embed_dim
        self.mixer = config.mixer
        self.residual = config.residual

        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        if config.mixer == "attention":
            self.timeattn = Attention(dim, config.num_heads, config.use_flash_attn)
        elif config.mixer in ("vim", "vim_spacetime"):
            self.time_mamba = BiMambaMixer(
                dim, config.d_state, config.d_conv, config.ssm_expand, config.dt_rank, config.scan_backend
            )
        else:
            self.time_mixer = build_mixer(config)
        # The gate is closed (0) by default, so that the untrained block is the image model.
        self.alpha_timeattn = nn.Parameter(torch.full([], float(config.time_gate_init)))

        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, config.num_heads, config.use_flash_attn)

        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, config.mlp_ratio, config.act_layer)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, cls: torch.Tensor, tokens: torch.Tensor, cls_only: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the block. With `cls_only` no tokens are returned and no MLP is computed for them, as in a tower's last
        block.
        """
        mixed = self.drop_path(self.mix_time(self.norm3(tokens)))
        r = torch.addcmul(tokens, mixed, torch.tanh(self.alpha_timeattn))  # tokens + mixed · tanh(α)

        space_cls, space = self.drop_paths(*self.mix_space(self.norm1(cls), self.norm1(r)))
        cls = cls + space_cls
        if cls_only:
            return cls + self.drop_path(self.mlp(self.norm2(cls))), None
        tokens = (tokens if self.residual == "frozen" else r) + space

        mlp_cls, mlp = self.drop_paths(self.mlp(self.norm2(cls)), self.mlp(self.norm2(tokens)))
        return cls + mlp_cls, tokens + mlp

    def mix_time(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mix over time: (B, N, T, D) → the same shape. The rows are views of the tokens; nothing is copied."""
        if self.mixer == "attention":
            return self.timeattn(tokens.flatten(0, 1)).view_as(tokens)  # (B·N, T, D)
        if self.mixer == "vim":
            return self.time_mamba(tokens.flatten(0, 1)).view_as(tokens)  # (B·N, T, D)
        if self.mixer == "vim_spacetime":
            return self.time_mamba(tokens.flatten(1, 2)).view_as(tokens)  # (B, N·T, D)
        return self.time_mixer(tokens.flatten(0, 1)).view_as(tokens)  # (B·N, T, D)

    def mix_space(self, cls: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over [CLS, patches] of each frame. Every frame gets the CLS, and its results are averaged."""
        cls, tokens = self.mix_space_of_frames(cls, tokens)
        return cls.mean(dim=1, keepdim=True), tokens

    def mix_space_of_frames(self, cls: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `mix_space` does, but return the CLS of each frame, (B, T, D), because no frame depends on another
        here.
        """
        clips, patches, frames, dim = tokens.shape
        per_frame = [cls[:, None].expand(-1, frames, -1, -1), tokens.transpose(1, 2)]  # (B, T, 1 and N, D)
        rows = torch.cat(per_frame, dim=2).flatten(0, 1)  # (B·T, 1+N, D)
        out = self.attn(rows).view(clips, frames, 1 + patches, dim)
        return out[:, :, 0], out[:, :, 1:].transpose(1, 2)  # (B, T, D), (B, N, T, D)

    def drop_paths(self, cls: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply stochastic depth, which drops the CLS and the tokens of a clip together."""
        if not self.training or not self.drop_path.drop_prob:
            return cls, tokens
        keep = self.drop_path(cls.new_ones(len(cls), 1, 1))  # 0 or 1 / (1 - rate) for each clip
        return cls * keep, tokens * keep[..., None]


# ---- the tower ---------------------------------------------------------------------------------


class DividedTower(nn.Module):
    """The divided tower: video (B, C, T, height, width) → (B, E).

    T may be any number, and height and width may be any multiples of the patch size. Where they differ from the
    configuration's, the embeddings are resized in the forward pass: the temporal one linearly, the position embedding
    bicubically.
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
        # Other mixers depend on the order of their tokens; attention needs an embedding of time.
        self.temporal_embed = (
            nn.Parameter(torch.empty(1, config.num_frames, dim)) if config.mixer == "attention" else None
        )
        self.ln_pre = nn.LayerNorm(dim, eps=1e-5)
        self.blocks = nn.ModuleList(DividedBlock(config, rate) for rate in drop_path_rates(config))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.image_projection: nn.Parameter | None = nn.Parameter(torch.empty(dim, config.project_embed_dim))
        self.init_parameters()

    def each_block(self) -> "list[DividedBlock]":
        """Return the blocks from the first to the last."""
        return cast("list[DividedBlock]", list(self.blocks))

    def init_parameters(self) -> None:
        """Set Video Mamba Suite's initial values.

        Linear layers keep PyTorch's values, uniform in ±1/√inputs, biases too: where CLIP's weights are loaded
        afterwards, only time attention still has these values. Mixers set their own initial values.
        """
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
        if self.image_projection is not None:
            nn.init.normal_(self.image_projection, std=self.width**-0.5)
        if self.temporal_embed is not None:
            nn.init.zeros_(self.temporal_embed)

    def features(self, video: torch.Tensor) -> torch.Tensor:
        """Return the CLS after the last norm: (B, C, T, height, width) → (B, D)."""
        cls, _ = self.encode(video, cls_only=True)
        return self.norm(cls[:, 0])

    def token_features(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens after the last norm: (B, C, T, height, width) → CLS (B, D) and patches (B, N, T, D)."""
        cls, tokens = self.encode(video, cls_only=False)
        return self.norm(cls[:, 0]), self.norm(tokens)

    def encode(self, video: torch.Tensor, cls_only: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run all blocks: (B, C, T, height, width) → cls (B, 1, D) and tokens (B, N, T, D).

        With `cls_only` the last block computes no tokens, and None stands in their place.
        """
        grid = patch_grid(video, self.patch_embed.proj.kernel_size[0])
        position = resize_position_embed(self.pos_embed, grid)  # (1, 1+N, D)
        tokens = embed_patches(video, self.patch_embed.proj, self.use_fast_conv1)  # (B, N, T, D)
        tokens = tokens + position[:, 1:, None]
        if self.temporal_embed is not None:
            tokens = tokens + resize_temporal_embed(self.temporal_embed, video.shape[2])  # (1, T, D)
        if self.training and self.patch_dropout:
            tokens = drop_patches(tokens, self.patch_dropout)
        cls = (self.cls_token + position[:, :1]).expand(tokens.shape[0], -1, -1)  # (B, 1, D)

        cls, tokens = self.ln_pre(cls), self.ln_pre(tokens)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            cls, tokens = run_block(block, cls, tokens, cls_only and i == last, checkpointed=self.grad_checkpointing)
        return cls, tokens

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return project(self.features(video), self.image_projection)


def _stack(tower: DividedTower) -> Stack:
    before = [tower.patch_embed, tower.cls_token, tower.pos_embed, tower.temporal_embed, tower.ln_pre]
    return Stack([part for part in before if part is not None], tower.each_block(), [tower.norm])


# ---- long videos --------------------------------------------------------------------------------


def _stem(tower: DividedTower) -> Stem:
    conv, position = tower.patch_embed.proj, tower.pos_embed
    return Stem(conv, tower.use_fast_conv1, tower.cls_token, position, tower.temporal_embed, tower.ln_pre)


def _bytes_beside(config: ModelConfig, small: int) -> int:
    """Return the bytes per element beside the stream: none in a vanilla block, which replaces the tokens by the tokens
    after time mixing; a Frozen block needs both.
    """
    if config.residual == "vanilla":
        return 4 if config.mixer == "vim_spacetime" else 0
    return small


def walk_divided(tower: DividedTower, stream: Stream) -> torch.Tensor:
    """Compute `tower.features` of a long video, (1, D)."""
    cls, tokens = stream.cls, stream.tokens
    blocks = tower.each_block()
    first = blocks[0]
    if first.residual == "frozen":
        mixed = stream.beside()
    else:
        mixed = stream.beside(tokens.dtype) if first.mixer == "vim_spacetime" else tokens
    for i, block in enumerate(blocks):
        _mix_time(block, stream, mixed)
        cls = _mix_space(block, cls, stream, mixed, is_last=i == len(blocks) - 1)
    return tower.norm(cls[:, 0])


def _mix_time(block: DividedBlock, stream: Stream, mixed: torch.Tensor) -> None:
    """Write tokens + tanh(α) · (the result of time mixing) to `mixed`, which may be the tokens themselves."""
    tokens, gate = stream.tokens, torch.tanh(block.alpha_timeattn)
    if block.mixer != "vim_spacetime":
        for n in stream.rows():
            mixed[:, n] = torch.addcmul(tokens[:, n], block.mix_time(block.norm3(tokens[:, n])), gate)
        return
    steps, out = tokens.flatten(1, 2), mixed.flatten(1, 2)  # (1, N·T, D), views
    parts, carry = list(pieces(steps.shape[1], stream.max_tokens)), None
    for p in reversed(parts):
        out[:, p], carry = block.time_mamba.scan_piece(block.norm3(steps[:, p]), carry, reverse=True)
    carry = None
    for p in parts:
        forward, carry = block.time_mamba.scan_piece(block.norm3(steps[:, p]), carry, reverse=False)
        out[:, p] = torch.addcmul(steps[:, p], forward + out[:, p], gate)


def _mix_space(
    block: DividedBlock, cls: torch.Tensor, stream: Stream, mixed: torch.Tensor, is_last: bool
) -> torch.Tensor:
    """Apply space attention and the MLP, some frames at a time, and replace the tokens. Return the new CLS."""
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


# ---- checkpoints --------------------------------------------------------------------------------

_LAYOUT = Layout(
    name="divided",
    requires=("visual.blocks.",),
    excludes=("visual.blocks.0.attn.qkv.",),
    position="visual.pos_embed",
    patches="visual.patch_embed.proj.weight",
    blocks="visual.blocks.",
    text="textual.",
    projection="visual.image_projection",
    temporal="visual.temporal_embed",
    act_layer="gelu",
    norm_style="openai",  # Video Mamba Suite trains with CLIP's mean
)
_BLOCK = r"visual\.blocks\.\d+\."
_TEMPORAL = re.compile(rf"visual\.temporal_embed$|{_BLOCK}(?:norm3|timeattn|time_mamba|time_mixer|alpha_timeattn)")
_NONE = re.compile(r"(?!)")


def has_time_mamba(weights: Weights) -> bool:
    return any(".time_mamba." in name for name in weights)


def _could_be(config: ModelConfig, weights: Weights) -> bool:
    """Return whether the weights fit the configuration: vanilla and Frozen residuals have the same parameters, and so
    do ViM in time and in space-time.
    """
    if has_time_mamba(weights):
        return config.mixer in ("vim", "vim_spacetime")
    own = any(
        ".time_mixer." in name for name in weights
    )  # the weights are those of a mixer that `register_mixer` added
    return config.mixer not in ("vim", "vim_spacetime") if own else config.mixer == "attention"


def _further_sizes(weights: Weights, shape: ShapeReader, width: int) -> dict[str, Any]:
    mixer = f"{_LAYOUT.blocks}0.time_mamba."
    found = shape(f"{mixer}A_log", 2)
    if found is None:
        return {}
    sizes: dict[str, Any] = {"ssm_expand": max(1, found[0] // width), "d_state": found[1]}
    if conv := shape(f"{mixer}conv1d.weight", 3):
        sizes["d_conv"] = conv[2]
    if rank := shape(f"{mixer}dt_proj.weight", 2):
        sizes["dt_rank"] = None if rank[1] == math.ceil(width / 16) else rank[1]
    return sizes


def _ignored(config: ModelConfig) -> dict[str, str]:
    ignored = {"gated_time": "the divided towers are always gated; this is LaViLa's choice"}
    if config.mixer == "attention":
        ignored |= dict.fromkeys(VIM_FIELDS, "this model has no ViM mixer")
    return ignored


# ---- the registered rows -----------------------------------------------------------------------


def build_divided(config: ModelConfig) -> CLIP:
    return CLIP(DividedTower(config), TextTransformer(config), config)


register_tower(
    Tower(
        name="divided",
        module=DividedTower,
        build=build_divided,
        layout=_LAYOUT,
        choices=("residual", "mixer"),
        ignored=_ignored,
        could_be=_could_be,
        further_sizes=_further_sizes,
        temporal=_TEMPORAL,
        time_from_lavila=lambda config: _TEMPORAL if config.mixer == "attention" else _NONE,
        video_stack=_stack,
        stem=_stem,
        walk=walk_divided,
        bytes_beside=_bytes_beside,
    )
)

_SIZES: dict[str, dict[str, Any]] = {
    "T16": {"embed_dim": 192, "num_heads": 3},
    "S16": {"embed_dim": 384, "num_heads": 6},
    "B16": {},
    "L14": {
        "patch_size": 14,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "text_width": 768,
        "text_heads": 12,
    },
}
_ROWS = [  # ID4 … ID8 in the order of Table 8; the upstream code has B/16 only
    ("TIMESFORMER", "attention", "vanilla", "CLIP_TimeSformerB16"),
    ("TIMESFORMER_FROZEN", "attention", "frozen", "CLIP_FrozenInTime_TimeSformerB16"),
    ("TIMEMAMBA", "vim", "vanilla", "CLIP_TimeMamba_like_timesformer"),
    ("TIMEMAMBA_FROZEN", "vim", "frozen", "CLIP_TimeMamba_like_frozen"),
    ("TIMEMAMBA_SPACETIME", "vim_spacetime", "frozen", "CLIP_TimeMamba_like_frozen_joint"),
]

for _row, _mixer, _residual, _upstream in _ROWS:
    for _size, _fields in _SIZES.items():
        register_model(
            ModelConfig(f"{_row}_VIT{_size}", "divided", mixer=_mixer, residual=_residual, **_fields),
            aliases=(_upstream,) if _size == "B16" else (),
        )
