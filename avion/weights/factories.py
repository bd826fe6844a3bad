"""Factory functions of AVION and Video Mamba Suite: a model with initial weights in one call, for people's scripts."""

from collections.abc import Callable

from avion.errors import UserError
from avion.models.clip import CLIP
from avion.models.registry import create_model

from .zoo import load_pretrained


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
