"""Parameter groups and optimizers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from avion.constants import OPTIMIZERS
from avion.errors import UserError


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: parameters that decay, and those that do not.

    No decay for biases and anything of fewer than two dimensions (AVION's rule), and for what the model
    names in `no_weight_decay()`: the state matrices A_log of the scan, which are 2-D but no projection.
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unknown = exempt - {name for name, _ in model.named_parameters()}
    assert not unknown, f"no_weight_decay() names parameters that do not exist: {sorted(unknown)}"
    no_decay = {n for n, p in trained.items() if p.ndim < 2 or n.endswith("bias") or n in exempt}
    groups = [
        {"params": [p for n, p in trained.items() if n not in no_decay], "weight_decay": weight_decay},
        {"params": [p for n, p in trained.items() if n in no_decay], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    use_zero: bool = False,
) -> torch.optim.Optimizer:
    """AdamW or SGD over `param_groups`; with `use_zero` its state is sharded over the processes.

    SGD's momentum is the first of `betas` (AVION's rule); it has no use for the second one and for `eps`.
    """
    groups = param_groups(model, weight_decay)
    if not groups:
        raise UserError("the model has no trainable parameter")
    # Fused: one pass over parameters, gradients and state, on CPUs as well as on GPUs.
    if name == "adamw":
        cls, options = torch.optim.AdamW, {"lr": lr, "betas": tuple(betas), "eps": eps, "fused": True}
    elif name == "sgd":
        cls, options = torch.optim.SGD, {"lr": lr, "momentum": betas[0], "fused": True}
    else:
        raise UserError(f"--optimizer {name}: unknown; choose from {', '.join(OPTIMIZERS)}")
    if use_zero:
        return ZeroRedundancyOptimizer(groups, optimizer_class=cls, **options)
    return cls(groups, **options)


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict(saved)`, with every tensor on the device where the optimizer uses it.

    ZeroRedundancyOptimizer puts 0-dimensional tensors (AdamW's `step`) on the CPU, whatever the optimizer inside it
    is: a fused or capturable one wants them beside the parameters. It also keeps this process's share twice.

    Args:
        saved: what `state_dict` returned, of all processes; it is left as it is.

    Raises:
        ValueError, KeyError, TypeError, IndexError, AttributeError: `saved` is of other parameters.
    """
    optimizer.load_state_dict({**saved, "state": dict(saved["state"])})  # ZeRO empties the others' shares in it
    inner = optimizer
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        inner = optimizer.optim
        inner.load_state_dict(inner.state_dict())  # PyTorch's own rule for where each tensor belongs
        optimizer.state.clear()
    for parameter, state in inner.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                found, wanted = tuple(value.shape), tuple(parameter.shape)
                raise ValueError(f"it has a {name} of shape {found} for a parameter of shape {wanted}")
