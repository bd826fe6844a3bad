"""Attention, MLP, patch embedding and CLIP's text tower: the parts of the towers.

The letters in the shapes of avion/models:

    B  clips (or texts) in a batch     D  width of the tower             H  heads, D = H · d
    T  frames of a clip                E  width that both towers share   P  side of a patch, pixels
    N  patches kept of a frame         R  rows: sequences that attend    S  length of a row
    L  tokens of a text                   only within themselves
"""

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from avion.errors import UserError
from avion.ops.exporting import exporting

from .config import ModelConfig

# The standard deviation of initial embeddings and of AVION's linear layers, which is timm's for ViTs.
INIT_STD = 0.02

# ---- attention ---------------------------------------------------------------------------------

# CUDA puts rows × heads into a grid dimension of 16 bits; B·N rows of time attention exceed it.
MAX_ROWS_X_HEADS = 65_535

# The plain math kernel holds all scores; for long sequences the scores of some queries are computed at a time.
MAX_MATH_SCORES = 2**26

FUSED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, use_flash: bool | None = None, causal: bool = False
) -> torch.Tensor:
    """Compute softmax(q kᵀ / √d) v and put all heads side by side.

    Args:
        q: Queries, (R, H, S, d).
        k: Keys, (R, H, S', d).
        v: Values, (R, H, S', d).
        use_flash: True allows only fused kernels and fails where none can run, False takes the plain math kernel, None
            leaves the choice to PyTorch.
        causal: Whether a token attends to itself and the tokens before it only.

    Returns:
        (R, S, D).
    """
    if exporting():  # any number of rows, on any machine
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
    rows, heads = q.shape[:2]
    per_call = max(1, MAX_ROWS_X_HEADS // heads)
    if use_flash is False and not causal:
        queries = max(1, MAX_MATH_SCORES // max(1, rows * heads * k.shape[2]))
        if queries < q.shape[2]:
            return torch.cat([attend(piece, k, v, use_flash) for piece in q.split(queries, dim=2)], dim=1)
    if rows <= per_call:
        return _sdpa(q, k, v, use_flash, causal).flatten(2)
    pieces = zip(q.split(per_call), k.split(per_call), v.split(per_call), strict=True)
    return torch.cat([_sdpa(*piece, use_flash, causal) for piece in pieces]).flatten(2)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, use_flash: bool | None, causal: bool) -> torch.Tensor:
    """(R, H, S, d) → (R, S, H, d), the order in which the kernels write."""
    if use_flash is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        with sdpa_kernel(FUSED_KERNELS if use_flash else [SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2)


def split_heads(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split (R, S, 3·D) into q, k and v, each (R, H, S, d), which are views."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class Attention(nn.Module):
    """Multi-head self-attention within each row, (R, S, D) → (R, S, D), with the names of AVION's checkpoints."""

    def __init__(self, dim: int, heads: int, use_flash: bool | None = None):
        super().__init__()
        self.heads = heads
        self.use_flash = use_flash
        self.Wqkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = split_heads(self.Wqkv(x), self.heads)  # (R, H, S, d)
        return self.out_proj(attend(q, k, v, self.use_flash))


class TextAttention(nn.Module):
    """Causal self-attention of CLIP's text tower, (B, L, D) → (B, L, D), with the names of nn.MultiheadAttention."""

    def __init__(self, dim: int, heads: int, use_flash: bool | None = None):
        super().__init__()
        self.heads = heads
        self.use_flash = use_flash
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = split_heads(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.heads)
        return self.out_proj(attend(q, k, v, self.use_flash, causal=True))


# ---- MLP ---------------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    """CLIP's activation, x · sigmoid(1.702 x). It is computed with SiLU, which keeps one tensor for the backward pass,
    not two.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(1.702 * x) / 1.702


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class Mlp(nn.Module):
    """A perceptron with one hidden layer, D → ratio · D → D, on the last dimension."""

    def __init__(self, dim: int, ratio: float, act_layer: str):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.act = ACTIVATIONS[act_layer]()
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TextMlp(nn.Module):
    """A perceptron with one hidden layer, D → 4 D → D, with the names of CLIP's text tower."""

    def __init__(self, dim: int, act_layer: str):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.act = ACTIVATIONS[act_layer]()
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.c_fc(x)))


# ---- stochastic depth ---------------------------------------------------------------------------


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, each row of the batch is zero with probability `drop_prob`.

    The other rows are divided by the probability of being kept. The random numbers are those that timm's layer draws.
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1 - self.drop_prob
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (kept.div_(keep) if keep > 0 else kept)


# ---- CLIP's transformer ------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """x ← x + attention(ln_1(x)); x ← x + mlp(ln_2(x)); (B, S, D) → (B, S, D)."""

    def __init__(
        self, dim: int, attn: "Attention | TextAttention", mlp: "Mlp | TextMlp", eps: float, drop_path: float = 0.0
    ):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.ln_2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
        """Run the block. With `cls_only` the MLP is computed for the first token only, (B, 1, D), as in a tower's last
        block.
        """
        x = x + self.drop_path(self.attn(self.ln_1(x)))
        if cls_only:
            x = x[:, :1]
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """The blocks, under the name that checkpoints give them."""

    def __init__(self, blocks: list[ResidualBlock], grad_checkpointing: bool):
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)
        self.grad_checkpointing = grad_checkpointing

    def blocks(self) -> list[ResidualBlock]:
        """Return the blocks from the first to the last."""
        return cast("list[ResidualBlock]", list(self.resblocks))

    def forward(self, x: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
        """Run all blocks: (B, S, D) → (B, S, D), or (B, 1, D) where only the CLS is needed."""
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            x = run_block(block, x, cls_only and i == last, checkpointed=self.grad_checkpointing)
        return x


def run_block(block: nn.Module, *args: Any, checkpointed: bool) -> Any:
    """Call `block(*args)`. If `checkpointed`, only the inputs are kept, and the backward pass runs the block again.

    Of a block that no gradient enters, nothing is kept in either case.
    """
    if checkpointed and torch.is_grad_enabled() and _takes_gradients(block, args):
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def _takes_gradients(block: nn.Module, args: tuple[Any, ...]) -> bool:
    inputs = (x for x in args if isinstance(x, torch.Tensor))
    return any(x.requires_grad for x in (*inputs, *block.parameters()))


def drop_path_rates(config: ModelConfig) -> list[float]:
    """Return one rate per block, rising linearly from 0 in the first block to drop_path_rate in the last."""
    steps = max(1, config.depth - 1)
    return [config.drop_path_rate * i / steps for i in range(config.depth)]


# ---- from pixels to tokens ---------------------------------------------------------------------


def embed_patches(video: torch.Tensor, conv: nn.Conv2d, fast: bool) -> torch.Tensor:
    """Embed the patches of every frame.

    Args:
        video: (B, C, T, height, width) float.
        conv: The convolution that holds the weights.
        fast: Whether the embedding is computed as a reshape and one matrix product with the same weights, which writes
            the tokens in the right order at once; otherwise the convolution is called.

    Returns:
        (B, N, T, D); N runs over the patches row by row.
    """
    assert video.is_floating_point(), f"video must be normalised to floats first, found {video.dtype}"
    video = video.to(conv.weight.dtype)
    patch = conv.kernel_size[0]
    clips, chans, frames, height, width = video.shape
    if height % patch or width % patch or chans != conv.in_channels:
        raise UserError(
            f"video of shape {tuple(video.shape)}: wanted (B, {conv.in_channels}, T, H, W) "
            f"with H and W multiples of the patch size {patch}"
        )
    if fast:
        x = video.reshape(clips, chans, frames, height // patch, patch, width // patch, patch)
        x = x.permute(0, 3, 5, 2, 1, 4, 6).flatten(4)  # (B, h, w, T, C·P·P)
        return F.linear(x.flatten(1, 2), conv.weight.flatten(1))  # (B, N, T, D)
    x = conv(video.transpose(1, 2).flatten(0, 1))  # (B·T, D, h, w)
    return x.flatten(2).unflatten(0, (clips, frames)).permute(0, 3, 1, 2)  # (B, N, T, D)


def patch_grid(video: torch.Tensor, patch: int) -> tuple[int, int]:
    """Return the numbers of rows and columns of patches in a frame."""
    return video.shape[3] // patch, video.shape[4] // patch


def drop_patches(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Keep a random share of 1 - rate of the patches, which differs from clip to clip and is the same in all frames of
    a clip.

    Args:
        x: Patches, (B, N, T, D).
        rate: The share of patches that are left out.

    Returns:
        (B, N', T, D), in the old order. At least one patch is kept.
    """
    clips, patches = x.shape[:2]
    kept = max(1, round(patches * (1 - rate)))
    chosen = torch.rand(clips, patches, device=x.device).argsort(dim=1)[:, :kept].sort(dim=1).values  # (B, N')
    rows = chosen + patches * torch.arange(clips, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (clips, kept))


class PatchEmbed(nn.Module):
    """The convolution of `embed_patches`, under the name of timm's checkpoints, `proj`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, size, size, bias=False)


# ---- ends of the towers -------------------------------------------------------------------------


def project(features: torch.Tensor, projection: nn.Parameter | None) -> torch.Tensor:
    """Project features, (B, D) → (B, E). Without a projection, which a classifier removes, return them unchanged."""
    return features if projection is None else features @ projection


# ---- CLIP's text tower -------------------------------------------------------------------------


class TextParts(Protocol):
    """A module that holds the parts of a text tower, as `encode_tokens` needs them."""

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    ln_final: nn.LayerNorm
    text_projection: nn.Parameter


class TextTransformer(nn.Module):
    """CLIP's text tower: tokens (B, L) int64 → (B, E), read at the end-of-text token; L is at most 77 by default."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.text_width
        self.token_embedding = nn.Embedding(config.vocab_size, dim)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, dim))
        blocks = [
            ResidualBlock(
                dim,
                TextAttention(dim, config.text_heads, config.use_flash_attn),
                TextMlp(dim, config.act_layer),
                eps=1e-5,
            )
            for _ in range(config.text_layers)
        ]
        self.transformer = Transformer(blocks, config.grad_checkpointing)
        self.ln_final = nn.LayerNorm(dim, eps=1e-5)
        self.text_projection = nn.Parameter(torch.empty(dim, config.project_embed_dim))
        self.init_parameters()

    def init_parameters(self) -> None:
        """Set CLIP's initial values: the layers that write into the residual stream start smaller, by √(2 · depth). The
        biases of the MLP are those of `nn.Linear`.
        """
        width = self.positional_embedding.shape[1]
        out_std = width**-0.5 * (2 * len(self.transformer.resblocks)) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=INIT_STD)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.blocks():
            assert isinstance(block.attn, TextAttention) and isinstance(block.mlp, TextMlp)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=out_std)
            nn.init.zeros_(block.attn.in_proj_bias)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=out_std)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return encode_tokens(self, tokens)


def encode_tokens(tower: TextParts, tokens: torch.Tensor) -> torch.Tensor:
    """Run a text tower, whichever module holds its parts (LaViLa's model itself holds them): (B, L) → (B, E)."""
    length = tokens.shape[1]
    if length > len(tower.positional_embedding):
        raise UserError(
            f"texts of {length} tokens, but the model's context_length is {len(tower.positional_embedding)}; "
            "tokenize with that context length"
        )
    x = tower.token_embedding(tokens) + tower.positional_embedding[:length]  # (B, L, D)
    x = tower.transformer(x)
    rows = torch.arange(x.shape[0], device=x.device)
    end = tokens.argmax(dim=1)  # the end-of-text token has the largest id
    return tower.ln_final(x[rows, end]) @ tower.text_projection  # (B, E)
