"""Names of parameters in upstream's files, and the names that this project's models have for them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

# Parameters that were saved under two names, by the attention and MLP in use. In our video towers they
# have the left names, in our text towers the right ones.
_TWINS = (
    ("attn.Wqkv.weight", "attn.in_proj_weight"),
    ("attn.Wqkv.bias", "attn.in_proj_bias"),
    ("mlp.fc1.weight", "mlp.c_fc.weight"),
    ("mlp.fc1.bias", "mlp.c_fc.bias"),
    ("mlp.fc2.weight", "mlp.c_proj.weight"),
    ("mlp.fc2.bias", "mlp.c_proj.bias"),
)

CONV1 = "visual.conv1.weight"


def canonical_name(name: str) -> str:
    """The name that this project's models give to a parameter that upstream saved as `name`."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]  # compile can wrap one tower alone
    while parts[0] == "module" and len(parts) > 1:
        parts.pop(0)
    if parts[0] == "text" and len(parts) > 1:  # open_clip's newer models
        parts.pop(0)
    name = ".".join(parts)
    visual = name.startswith("visual.")
    for flash, plain in _TWINS:
        old, new = (plain, flash) if visual else (flash, plain)
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


def square_conv1(value: Tensor) -> Tensor:
    """AVION's fast conv1, (D, C·P·P) in (C, h, w) order, as (D, C, P, P); any other shape as it is."""
    side = round((value.shape[1] / 3) ** 0.5) if value.ndim == 2 else 0
    return value.reshape(-1, 3, side, side) if side and 3 * side * side == value.shape[1] else value


def rename_to_ours(state_dict: dict[str, Any], prefix: str, ours: Iterable[str]) -> None:
    """Bring the entries of one model, which begin with `prefix`, under the model's names `ours`, in place.

    Only a name that the model does not have is changed, and only to one that it has and that no other entry claims.
    What stays over is PyTorch's to report.
    """
    ours = set(ours)
    present = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
    renamed: dict[str, list[str]] = {}
    for name in present - ours:
        if (new := canonical_name(name)) in ours and new not in present:
            renamed.setdefault(new, []).append(name)
    for new, old in renamed.items():
        if len(old) == 1:
            state_dict[prefix + new] = state_dict.pop(prefix + old[0])
    fast = state_dict.get(prefix + CONV1)
    if CONV1 in ours and isinstance(fast, Tensor):
        state_dict[prefix + CONV1] = square_conv1(fast)
