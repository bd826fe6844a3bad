"""CLIP's two towers in one module, the video classifier, and AVION's entries.

Shapes: letters as in transformer.py.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from avion.errors import UserError

from .registry import ModelConfig, create_model, register_model
from .transformer import JointViT, TextTransformer


class CLIP(nn.Module):
    """A video tower and a text tower with one embedding space (arXiv 2103.00020).

    `visual` maps (B, C, T, height, width) to (B, E), `textual` maps (B, L) to (B, E).
    """

    def __init__(self, visual: nn.Module, textual: nn.Module | None, config: ModelConfig):
        super().__init__()
        self.config = config
        self.visual = visual
        if textual is not None:
            self.textual = textual
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(1 / config.temperature_init)), requires_grad=not config.freeze_temperature
        )

    def encode_image(self, video: torch.Tensor) -> torch.Tensor:
        """video (B, C, T, height, width) float, normalised → (B, E), of any length."""
        return self.visual(video)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L) int64, L at most the context length → (B, E), of any length."""
        return self.textual(tokens)

    def forward(self, video: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, C, T, height, width) and (B, L) → two (B, E) of length 1, and the logit scale, 0-d."""
        video_embed = F.normalize(self.encode_image(video), dim=-1)
        text_embed = F.normalize(self.encode_text(tokens), dim=-1)
        return video_embed, text_embed, self.logit_scale.exp()

    def no_weight_decay(self) -> set[str]:
        """Full names of the matrices that take no weight decay."""
        return _state_matrices(self)


class VideoClassifier(nn.Module):
    """A video tower with one linear head: (B, C, T, height, width) → logits (B, num_classes).

    vision_model: the `visual` of any registered model. Its projection into the shared embedding is
    taken away; the head reads the CLS after the last norm, `vision_model.width` channels.
    config: the two-tower model's, of which this is one tower; actions: what the classes stand for. Both go into
    checkpoints (see classifier.py).
    """

    def __init__(
        self,
        vision_model: nn.Module,
        dropout: float,
        num_classes: int,
        config: ModelConfig | None = None,
        actions: Sequence[str] | None = None,
    ):
        super().__init__()
        self.config = config
        self.actions = None if actions is None else tuple(actions)
        self.visual = vision_model
        self.visual.image_projection = None
        self.dropout = nn.Dropout(dropout)
        self.fc_cls = nn.Linear(vision_model.width, num_classes)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.zeros_(self.fc_cls.bias)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.fc_cls(self.dropout(self.visual(video)))

    def no_weight_decay(self) -> set[str]:
        """As `CLIP.no_weight_decay`."""
        return _state_matrices(self)


def _state_matrices(module: nn.Module) -> set[str]:
    """The selective scans' A in both directions: decay would pull every state to the same memory."""
    return {name for name, _ in module.named_parameters() if name.endswith(("A_log", "A_b_log"))}


# ---- AVION's models, registered ----------------------------------------------------------------


def build_joint(config: ModelConfig) -> CLIP:
    return CLIP(JointViT(config), TextTransformer(config), config)


_LARGE = {
    "patch_size": 14,
    "embed_dim": 1024,
    "depth": 24,
    "num_heads": 16,
    "text_width": 768,
    "text_heads": 12,
}
register_model(ModelConfig("CLIP_VITB32", "joint", patch_size=32), build_joint)
register_model(ModelConfig("CLIP_VITB16", "joint"), build_joint)
register_model(ModelConfig("CLIP_VITL14", "joint", **_LARGE), build_joint)
register_model(ModelConfig("CLIP_VITL14_336PX", "joint", img_size=336, **_LARGE), build_joint)


# ---- factory functions of AVION and Video Mamba Suite, for people's own scripts ----------------


def _avion_factory(name: str) -> Callable[..., CLIP]:
    def build(
        freeze_temperature: bool = False,
        use_grad_checkpointing: bool = False,
        use_bidirectional_lm: bool = False,
        context_length: int = 77,
        vocab_size: int = 49408,
        patch_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        num_frames: int = 1,
        use_fast_conv1: bool = False,
        use_flash_attn: bool = False,
        use_quick_gelu: bool = False,
        project_embed_dim: int = 512,
        pretrain_zoo: str = "openai",
        pretrain_path: str | None = None,
    ) -> CLIP:
        from .pretrained import load_pretrained  # it needs create_model, and so this module

        if use_bidirectional_lm:
            raise UserError(f"{name}: use_bidirectional_lm=True is not supported; the text tower is CLIP's, causal")
        model = create_model(
            name,
            freeze_temperature=freeze_temperature,
            grad_checkpointing=use_grad_checkpointing,
            context_length=context_length,
            vocab_size=vocab_size,
            patch_dropout=patch_dropout,
            drop_path_rate=drop_path_rate,
            num_frames=num_frames,
            use_fast_conv1=use_fast_conv1,
            # AVION's other choice is PyTorch's attention module, which chooses the kernel, too.
            use_flash_attn=use_flash_attn or None,
            project_embed_dim=project_embed_dim,
        )
        load_pretrained(model, pretrain_zoo, pretrain_path)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"`create_model({name!r})` with AVION's arguments and defaults, and initial weights from\n"
        '    pretrain_zoo ("openai", "open_clip", "lavila", or "none"). An unknown argument is a TypeError.\n'
        "    use_flash_attn: True fused kernels only, False PyTorch's choice.\n"
        "    use_quick_gelu: without effect, as in AVION, whose scripts say True and whose models have GELU; the\n"
        '    other is `create_model(..., act_layer="quick_gelu")`. use_bidirectional_lm: refused if True.'
    )
    return build


CLIP_VITB32 = _avion_factory("CLIP_VITB32")
CLIP_VITB16 = _avion_factory("CLIP_VITB16")
CLIP_VITL14 = _avion_factory("CLIP_VITL14")
CLIP_VITL14_336PX = _avion_factory("CLIP_VITL14_336PX")
CLIP_TimeSformerB16 = _avion_factory("CLIP_TimeSformerB16")
CLIP_FrozenInTime_TimeSformerB16 = _avion_factory("CLIP_FrozenInTime_TimeSformerB16")
CLIP_TimeMamba_like_timesformer = _avion_factory("CLIP_TimeMamba_like_timesformer")
CLIP_TimeMamba_like_frozen = _avion_factory("CLIP_TimeMamba_like_frozen")
CLIP_TimeMamba_like_frozen_joint = _avion_factory("CLIP_TimeMamba_like_frozen_joint")
