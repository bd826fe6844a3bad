"""Names of parameters in upstream's files, and the names that this project's models have for them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

# Parameters that were saved under either of two names, depending on the attention and the MLP in use. Our video towers
# use the left names, our text towers the right ones.
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
    """Return the name that this project's models give to a parameter that upstream saved as `name`."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]  # `torch.compile` can wrap a single tower
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
    """Reshape the weight of AVION's fast conv1, (D, C·P·P) in (C, h, w) order, to (D, C, P, P); leave any other shape
    as it is.
    """
    side = round((value.shape[1] / 3) ** 0.5) if value.ndim == 2 else 0
    return value.reshape(-1, 3, side, side) if side and 3 * side * side == value.shape[1] else value


def rename_to_ours(state_dict: dict[str, Any], prefix: str, ours: Iterable[str]) -> None:
    """Give the entries of one model the model's own names, in place.

    A name is changed only if the model does not have it, and only to a name that the model has and that no other entry
    has. PyTorch reports what is left over.

    Args:
        state_dict: The entries.
        prefix: The beginning of the names of the model's entries.
        ours: The model's names, without the prefix.
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
