"""Features of every process, with gradients that come out right after DDP's averaging.

Let W be the number of processes. DistributedDataParallel divides summed parameter gradients by W, so the
gradient that a process hands to its own features must be W times the gradient of the global loss.
"""

import torch
import torch.distributed as dist


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _AllGather(torch.autograd.Function):
    """Concatenate `features` (B, E) of all processes in rank order: (W·B, E).

    `backward_mode` says what a process gets back for its own rows:
    "sum": the sum over processes (each process's loss is one share of the global loss, or a copy of it);
    "copies": W times its own gradient: each process computed the same global loss, so the other processes'
    gradients for these rows are copies of it and nothing needs to be sent;
    "own": its own gradient alone, the other processes' losses do not reach these rows.
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
    """(B, E) of this process to (W·B, E) of all, rank 0 first; the identity without a process group.

    Every process must hold the same number of rows. `backward_mode`: see `_AllGather`.
    """
    if backward_mode not in ("sum", "copies", "own"):
        raise ValueError(f"backward_mode must be sum, copies or own, got {backward_mode!r}")
    if world()[1] == 1:
        return features
    return _AllGather.apply(features, backward_mode)
