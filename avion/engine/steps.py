"""One optimizer step's worth of gradients, for each kind of loss.

Legend: k micro-batches, b clips in each, E embedding width.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Precision:
    """Autocast settings of a run."""

    device_type: str
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not torch.float32)


class _Generators:
    """The generators that a forward pass draws from, to run the same pass again."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def replayed(self):
        devices = [self.device] if self.cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], dict[str, torch.Tensor]]


def contrastive_step(
    model: nn.Module,
    micro_batches: Sequence[dict[str, Any]],
    loss_fn: LossFunction,
    precision: Precision,
    scale: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Leave in `.grad` what one batch of all k·b clips would; memory is that of one micro-batch.

    A contrastive loss couples all clips, so gradients of the micro-batches cannot simply be added up. With
    k > 1: (1) features of all micro-batches without a graph; (2) the loss over all of them and its gradient with
    respect to the features; (3) each micro-batch again, with a graph and the same random draws, and the
    features' gradient pushed through it. (Gradient caching: Gao et al., arXiv 2101.06983.)

    Args:
        model: (video, tokens) -> (video_embed (b, E), text_embed (b, E), logit_scale 0-d), maybe in DDP.
        loss_fn: (video_embed (k·b, E), text_embed (k·b, E), logit_scale, batch) -> dict with "loss"; `batch` is the
            micro-batches' own tensors concatenated, without video and tokens.
        scale: loss scaling before the backward pass (the identity, or a GradScaler's).

    Returns the loss function's figures, detached.
    """
    rest = _concatenate(micro_batches)
    if len(micro_batches) == 1:
        with precision.autocast():
            outputs = model(micro_batches[0]["video"], micro_batches[0]["tokens"])
        figures = loss_fn(*outputs, rest)
        scale(figures["loss"]).backward()
        return {k: v.detach() for k, v in figures.items()}

    bare = model.module if isinstance(model, DistributedDataParallel) else model
    device = micro_batches[0]["video"].device
    generators, cached = [], []
    for batch in micro_batches:
        generators.append(_Generators(device))
        with torch.no_grad(), precision.autocast():
            cached.append(bare(batch["video"], batch["tokens"]))
    video = torch.cat([c[0] for c in cached]).requires_grad_()  # (k·b, E)
    text = torch.cat([c[1] for c in cached]).requires_grad_()  # (k·b, E)
    logit_scale = cached[0][2].detach().requires_grad_()
    figures = loss_fn(video, text, logit_scale, rest)
    scale(figures["loss"]).backward()

    size = micro_batches[0]["video"].shape[0]
    temperature_grad = torch.zeros_like(logit_scale) if logit_scale.grad is None else logit_scale.grad
    for i, batch in enumerate(micro_batches):
        rows, is_last = slice(i * size, (i + 1) * size), i == len(micro_batches) - 1
        # DDP averages over processes once, in the last micro-batch's backward pass.
        silent = model.no_sync() if bare is not model and not is_last else contextlib.nullcontext()
        with silent:
            with generators[i].replayed(), precision.autocast():
                v, t, s = model(batch["video"], batch["tokens"])
            surrogate = (v * video.grad[rows]).sum() + (t * text.grad[rows]).sum()
            # The temperature is one parameter for all micro-batches; it is given its gradient once.
            (surrogate + s * (temperature_grad if is_last else torch.zeros_like(temperature_grad))).backward()
    return {k: v.detach() for k, v in figures.items()}


def supervised_step(
    model: nn.Module,
    micro_batches: Sequence[dict[str, Any]],
    loss_fn: Callable[[torch.Tensor, dict[str, Any]], dict[str, torch.Tensor]],
    precision: Precision,
    scale: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Leave in `.grad` what one batch of all k·b clips would, for a loss that is a mean over clips.

    Args:
        model: video -> logits (b, classes), maybe in DDP.
        loss_fn: (logits (b, classes) float32, micro-batch) -> dict with "loss", each a mean over the b clips.
        scale: as in `contrastive_step`.

    Returns the figures' means over the micro-batches, detached.
    """
    count = len(micro_batches)
    totals: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(micro_batches):
        is_last = i == count - 1
        # DDP averages over processes once, in the last micro-batch's backward pass.
        distributed = isinstance(model, DistributedDataParallel)
        silent = model.no_sync() if distributed and not is_last else contextlib.nullcontext()
        with silent:
            with precision.autocast():
                logits = model(batch["video"])
            figures = loss_fn(logits.float(), batch)
            scale(figures["loss"] / count).backward()
        for name, value in figures.items():
            totals[name] = totals.get(name, 0) + value.detach() / count
    return totals


def _concatenate(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tensors besides video and tokens, over all micro-batches."""
    first = batches[0]
    keys = [k for k, v in first.items() if isinstance(v, torch.Tensor) and k not in ("video", "tokens")]
    return {k: torch.cat([b[k] for b in batches]) for k in keys}
