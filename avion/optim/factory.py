"""Parameter groups and optimizers."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from avion.constants import OPTIMIZERS
from avion.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two groups: parameters that take weight decay, and parameters that take none.

    Biases and all parameters of fewer than two dimensions take none (AVION's rule), and neither do the parameters that
    the model names in `no_weight_decay()`: the state matrices A_log of the scan, which are 2-D but no projections.
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
    """Build AdamW or SGD over `param_groups`.

    Args:
        model: The model.
        name: "adamw" or "sgd".
        lr: The learning rate.
        weight_decay: The weight decay of the parameters that take it.
        betas: Those of AdamW. SGD's momentum is the first one (AVION's rule), and SGD ignores the second one.
        eps: That of AdamW; SGD ignores it.
        use_zero: Whether the optimizer's state is sharded over the processes.
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
        from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second, which only its users wait for

        return ZeroRedundancyOptimizer(groups, optimizer_class=cls, **options)
    return cls(groups, **options)


def is_sharded(optimizer: torch.optim.Optimizer) -> "TypeGuard[ZeroRedundancyOptimizer]":
    """Return whether this is a ZeroRedundancyOptimizer, each process of which has a share of the state."""
    module = sys.modules.get("torch.distributed.optim")  # without the module there is no optimizer of this kind
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Call `optimizer.load_state_dict(saved)`, and put every tensor on the device where the optimizer uses it.

    ZeroRedundancyOptimizer puts 0-dimensional tensors (AdamW's `step`) on the CPU, whatever the optimizer inside it is,
    but a fused or capturable optimizer needs them beside the parameters. It also keeps the share of this process twice.

    Args:
        optimizer: The optimizer that takes the state.
        saved: What `state_dict` returned, of all processes; it is not changed.

    Raises:
        ValueError, KeyError, TypeError, IndexError, AttributeError: `saved` belongs to other parameters.
    """
    optimizer.load_state_dict(
        {**saved, "state": dict(saved["state"])}
    )  # ZeRO empties the shares of the other processes in it
    inner = optimizer
    if is_sharded(optimizer):
        inner = optimizer.optim
        inner.load_state_dict(inner.state_dict())  # PyTorch's rule for the device of each tensor
        optimizer.state.clear()
    for parameter, state in inner.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                found, wanted = tuple(value.shape), tuple(parameter.shape)
                raise ValueError(f"it has a {name} of shape {found} for a parameter of shape {wanted}")
