"""Features of every process, with gradients that are right after the averaging of DistributedDataParallel.

Let W be the number of processes. DistributedDataParallel divides the summed gradients of the parameters by W, so the
gradient that a process gives to its own features must be W times the gradient of the global loss.
"""

import torch
import torch.distributed as dist


def world() -> tuple[int, int]:
    """Return the rank and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _AllGather(torch.autograd.Function):
    """Concatenate `features` (B, E) of all processes in rank order: (W·B, E).

    `backward_mode` says which gradient a process gets for its own rows. "sum" is the sum over processes, where each
    process's loss is one share of the global loss, or a copy of it. "copies" is W times the process's own gradient:
    each process computed the same global loss, so the gradients of the other processes for these rows are copies, and
    nothing needs to be sent. "own" is the process's own gradient only: the losses of the other processes do not reach
    these rows.
    """

    @staticmethod
    def forward(ctx, features: torch.Tensor, backward_mode: str) -> torch.Tensor:
        rank, size = world()
        ctx.rank, ctx.size, ctx.rows, ctx.mode = rank, size, features.shape[0], backward_mode
        gathered = [torch.empty_like(features) for _ in range(size)]
        dist.all_gather(gathered, features.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        own = slice(ctx.rank * ctx.rows, (ctx.rank + 1) * ctx.rows)
        if ctx.mode == "sum":
            grad = grad.contiguous().clone()
            dist.all_reduce(grad)
            return grad[own], None
        return grad[own] * (ctx.size if ctx.mode == "copies" else 1), None


def gather_features(features: torch.Tensor, backward_mode: str = "sum") -> torch.Tensor:
    """Gather features (B, E) of this process to (W·B, E) of all, rank 0 first; return them unchanged without a process
    group.

    Args:
        features: The features of this process. Every process must hold the same number of rows.
        backward_mode: "sum", "copies" or "own"; see `_AllGather`.
    """
    if backward_mode not in ("sum", "copies", "own"):
        raise ValueError(f"backward_mode must be sum, copies or own, got {backward_mode!r}")
    if world()[1] == 1:
        return features
    return _AllGather.apply(features, backward_mode)
