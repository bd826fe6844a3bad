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
            # Where AVION does not use flash attention, PyTorch chooses the kernel, which None says here.
            use_flash_attn=use_flash_attn or None,
            project_embed_dim=project_embed_dim,
        )
        load_pretrained(model, pretrain_zoo, pretrain_path)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"Build `create_model({name!r})` with AVION's arguments and defaults, and load initial weights.\n\n"
        "    Args:\n"
        '        pretrain_zoo: "openai", "open_clip", "lavila" or "none", as in `avion.weights.load_pretrained`.\n'
        "        pretrain_path: As in `avion.weights.load_pretrained`.\n"
        "        use_flash_attn: True: only fused kernels are used; False: PyTorch chooses the kernel.\n"
        "        use_quick_gelu: Has no effect, as in AVION, whose scripts say True and whose models have GELU.\n"
        '            A model with QuickGELU is `create_model(..., act_layer="quick_gelu")`.\n'
        "        use_bidirectional_lm: True is refused.\n\n"
        "    Raises:\n"
        "        UserError: The weights cannot be read or do not fit, or use_bidirectional_lm is True.\n"
        "        TypeError: An argument is unknown.\n    "
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
