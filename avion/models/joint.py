"""AVION's joint space-time ViT (arXiv 2309.16669): every token of a clip attends to all tokens of the clip.

The letters of the shapes are those of transformer.py. The tokens x (B, 1+T·N, D) are time-major after the CLS, "b (t n)
d".
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from .clip import CLIP
from .config import VIM_FIELDS, ModelConfig
from .registry import register_model
from .stream import Stem, Stream, compute_dtype, pieces
from .tower import Layout, Stack, Tower, Weights, register_tower, rename
from .transformer import (
    INIT_STD,
    Attention,
    Mlp,
    ResidualBlock,
    TextTransformer,
    Transformer,
    attend,
    drop_patches,
    drop_path_rates,
    embed_patches,
    patch_grid,
    project,
)
from .utils import resize_position_embed, resize_temporal_embed


class JointViT(nn.Module):
    """A video tower in which every token attends to all tokens of the clip: (B, C, T, height, width) → (B, E).

    Where the number or the size of the frames differs from the configuration's, the embeddings are resized in the
    forward pass.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, patches = config.embed_dim, (config.img_size // config.patch_size) ** 2
        self.width = dim
        self.patch_dropout = config.patch_dropout
        self.use_fast_conv1 = config.use_fast_conv1
        self.conv1 = nn.Conv2d(config.in_chans, dim, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(dim))
        self.positional_embedding = nn.Parameter(torch.empty(1 + patches, dim))
        self.temporal_embedding = nn.Parameter(torch.empty(config.num_frames, dim))
        self.ln_pre = nn.LayerNorm(dim, eps=1e-6)
        blocks = [
            ResidualBlock(
                dim,
                Attention(dim, config.num_heads, config.use_flash_attn),
                Mlp(dim, config.mlp_ratio, config.act_layer),
                eps=1e-6,
                drop_path=rate,
            )
            for rate in drop_path_rates(config)
        ]
        self.transformer = Transformer(blocks, config.grad_checkpointing)
        self.ln_post = nn.LayerNorm(dim, eps=1e-6)
        self.image_projection: nn.Parameter | None = nn.Parameter(torch.empty(dim, config.project_embed_dim))
        self.init_parameters()

    def init_parameters(self) -> None:
        """Set AVION's initial values, which are timm's. The norms start as the identity, unlike AVION's."""
        nn.init.normal_(self.class_embedding, std=INIT_STD)
        nn.init.normal_(self.positional_embedding, std=INIT_STD)
        nn.init.zeros_(self.temporal_embedding)
        if self.image_projection is not None:
            nn.init.normal_(self.image_projection, std=self.width**-0.5)
        for block in self.transformer.resblocks:
            for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
                nn.init.trunc_normal_(linear.weight, std=INIT_STD)
                nn.init.zeros_(linear.bias)

    def features(self, video: torch.Tensor) -> torch.Tensor:
        """Return the CLS after the last norm: (B, C, T, height, width) → (B, D)."""
        return self.ln_post(self.encode(video, cls_only=True)[:, 0])

    def token_features(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens after the last norm: (B, C, T, height, width) → CLS (B, D) and patches (B, N, T, D)."""
        x = self.ln_post(self.encode(video, cls_only=False))  # (B, 1+T·N, D)
        return x[:, 0], x[:, 1:].unflatten(1, (video.shape[2], -1)).transpose(1, 2)

    def encode(self, video: torch.Tensor, cls_only: bool) -> torch.Tensor:
        """Run all blocks: (B, C, T, height, width) → (B, 1+T·N, D), or (B, 1, D) with `cls_only`."""
        grid = patch_grid(video, self.conv1.kernel_size[0])
        position = resize_position_embed(self.positional_embedding, grid)  # (1+N, D)
        temporal = resize_temporal_embed(self.temporal_embedding, video.shape[2])  # (T, D)
        x = embed_patches(video, self.conv1, self.use_fast_conv1)  # (B, N, T, D)
        x = x + position[1:, None] + temporal
        if self.training and self.patch_dropout:
            x = drop_patches(x, self.patch_dropout)
        cls = (self.class_embedding + position[0]).expand(x.shape[0], 1, -1)  # (B, 1, D)
        x = torch.cat([cls, x.transpose(1, 2).flatten(1, 2)], dim=1)  # (B, 1+T·N, D)
        return self.transformer(self.ln_pre(x), cls_only)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return project(self.features(video), self.image_projection)


def _stack(tower: JointViT) -> Stack:
    embeddings = [tower.class_embedding, tower.positional_embedding, tower.temporal_embedding]
    return Stack([tower.conv1, *embeddings, tower.ln_pre], tower.transformer.blocks(), [tower.ln_post])


# ---- long videos --------------------------------------------------------------------------------


def _stem(tower: JointViT) -> Stem:
    cls, position = tower.class_embedding[None, None], tower.positional_embedding[None]
    return Stem(tower.conv1, tower.use_fast_conv1, cls, position, tower.temporal_embedding[None], tower.ln_pre)


def walk_joint(tower: JointViT, stream: Stream) -> torch.Tensor:
    """Compute `tower.features` of a long video, (1, D).

    All tokens attend to all tokens: the memory is bounded, but the time grows with the square of the number of frames.
    """
    cls, steps = stream.cls, stream.tokens.flatten(1, 2)  # (1, N·T, D), a view; here their order does not matter
    blocks, count = tower.transformer.blocks(), 1 + steps.shape[1]
    heads, dtype = blocks[0].attn.heads, compute_dtype(steps)
    keys, values = (steps.new_empty(1, heads, count, steps.shape[2] // heads, dtype=dtype) for _ in range(2))
    parts = list(pieces(steps.shape[1], stream.max_tokens))
    for i, block in enumerate(blocks):
        keys[:, :, :1], values[:, :, :1] = _in_heads(block, block.ln_1(cls), 1, 3)
        for p in parts:
            behind = slice(1 + p.start, 1 + p.stop)  # the CLS
            keys[:, :, behind], values[:, :, behind] = _in_heads(block, block.ln_1(steps[:, p]), 1, 3)
        cls = _joint_block(block, cls, keys, values)
        if i < len(blocks) - 1:
            for p in parts:
                steps[:, p] = _joint_block(block, steps[:, p], keys, values)
    return tower.ln_post(cls[:, 0])


def _joint_block(block: ResidualBlock, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Run the block for some tokens x (1, S, D), with keys and values (1, H, 1+N·T, d) of all tokens."""
    (query,) = _in_heads(block, block.ln_1(x), 0, 1)
    x = x + block.attn.out_proj(attend(query, keys, values, block.attn.use_flash))
    return x + block.mlp(block.ln_2(x))


def _in_heads(block: ResidualBlock, x: torch.Tensor, first: int, stop: int) -> tuple[torch.Tensor, ...]:
    """Return some of the queries (0), keys (1) and values (2) of the block's attention: those in [first, stop), each
    (1, H, S, d).
    """
    attn = block.attn
    assert isinstance(attn, Attention)
    part, dim = slice(first * x.shape[-1], stop * x.shape[-1]), x.shape[-1]
    projected = F.linear(x, attn.Wqkv.weight[part], attn.Wqkv.bias[part])
    return tuple(y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in projected.split(dim, dim=-1))


# ---- checkpoints --------------------------------------------------------------------------------

_LAYOUT = Layout(
    name="joint",
    requires=("visual.transformer.resblocks.",),
    excludes=("visual.proj",),
    position="visual.positional_embedding",
    patches="visual.conv1.weight",
    blocks="visual.transformer.resblocks.",
    text="textual.",
    projection="visual.image_projection",
    temporal="visual.temporal_embedding",
    act_layer="gelu",
    norm_style="openai_legacy",  # AVION trains with a mistyped mean of the red channel
)
_FROM_COMMON = (
    (r"visual\.cls_token", "visual.class_embedding"),
    (r"visual\.pos_embed", "visual.positional_embedding"),
    (r"visual\.temporal_embed$", "visual.temporal_embedding"),
    (r"visual\.patch_embed\.proj\.", "visual.conv1."),
    (r"visual\.norm\.", "visual.ln_post."),
    (r"visual\.blocks\.(\d+)\.norm([12])\.", r"visual.transformer.resblocks.\1.ln_\2."),
    (r"visual\.blocks\.(\d+)\.", r"visual.transformer.resblocks.\1."),
)
_TEMPORAL = re.compile(
    r"visual\.temporal_embedding$|visual\.transformer\.resblocks\.\d+\.(?:norm3|timeattn|alpha_timeattn)"
)


def _from_common(weights: Weights) -> dict[str, torch.Tensor]:
    renamed = rename(weights, _FROM_COMMON)
    for name, lead in (("class_embedding", 2), ("positional_embedding", 1), ("temporal_embedding", 1)):
        name = f"visual.{name}"
        if name in renamed and renamed[name].shape[:lead] == (1,) * lead:
            renamed[name] = renamed[name][(0,) * lead]  # (1, 1, D) → (D,), (1, T, D) → (T, D)
    return renamed


def _ignored(config: ModelConfig) -> dict[str, str]:
    ignored = dict.fromkeys(VIM_FIELDS, "this model has no ViM mixer")
    return ignored | dict.fromkeys(("gated_time", "time_gate_init"), "this model has no time attention of its own")


# ---- registered ---------------------------------------------------------------------------------


def build_joint(config: ModelConfig) -> CLIP:
    return CLIP(JointViT(config), TextTransformer(config), config)


register_tower(
    Tower(
        name="joint",
        module=JointViT,
        build=build_joint,
        layout=_LAYOUT,
        ignored=_ignored,
        from_common=_from_common,
        temporal=_TEMPORAL,
        time_from_lavila=lambda config: re.compile(r"visual\.temporal_embedding$"),
        video_stack=_stack,
        stem=_stem,
        walk=walk_joint,
        bytes_beside=lambda config, small: 2 * small,  # keys and values of all tokens
    )
)

_LARGE = {
    "patch_size": 14,
    "embed_dim": 1024,
    "depth": 24,
    "num_heads": 16,
    "text_width": 768,
    "text_heads": 12,
}
register_model(ModelConfig("CLIP_VITB32", "joint", patch_size=32))
register_model(ModelConfig("CLIP_VITB16", "joint"))
register_model(ModelConfig("CLIP_VITL14", "joint", **_LARGE))
register_model(ModelConfig("CLIP_VITL14_336PX", "joint", img_size=336, **_LARGE))
