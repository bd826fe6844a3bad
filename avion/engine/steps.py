"""The gradients of one optimizer step, for each kind of loss.

The trainer hands the micro-batches to an `Objective`. The objective runs the model on them, and its loss on what the
model returns. k is the number of micro-batches, b the number of clips in each, E the width of the embedding.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .precision import Precision


class _Generators:
    """The states of the generators that a forward pass draws from, so that the same pass can be run again."""

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


Scale = Callable[[torch.Tensor], torch.Tensor]
LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], dict[str, torch.Tensor]]


def contrastive_step(
    model: nn.Module,
    micro_batches: Sequence[dict[str, Any]],
    loss_fn: LossFunction,
    precision: Precision,
    scale: Scale,
) -> dict[str, torch.Tensor]:
    """Leave the gradients of one batch of all k·b clips in `.grad`, with the memory of one micro-batch.

    A contrastive loss couples all clips, so the gradients of the micro-batches cannot simply be added up. With k > 1,
    (1) the features of all micro-batches are computed without a graph; (2) the loss over all of them gives the gradient
    with respect to the features; (3) each micro-batch is computed again, with a graph and the same random draws, and
    the gradient of its features is pushed through the graph. (Gradient caching: Gao et al., arXiv 2101.06983.)

    Args:
        model: (video, tokens) → (video_embed (b, E), text_embed (b, E), logit_scale 0-d), possibly wrapped in DDP.
        micro_batches: Each has "video" (b, 3, T, H, W) and "tokens" (b, L).
        loss_fn: (video_embed (k·b, E), text_embed (k·b, E), logit_scale, batch) → dict with "loss". `batch` has the
            other tensors of the micro-batches, concatenated.
        precision: The settings of autocast.
        scale: The scaling of the loss before the backward pass (the identity, or that of a GradScaler).

    Returns:
        What the loss function returned, detached.
    """
    rest = _concatenate(micro_batches)
    if len(micro_batches) == 1:
        with precision.autocast():
            outputs = model(micro_batches[0]["video"], micro_batches[0]["tokens"])
        metrics = loss_fn(*outputs, rest)
        scale(metrics["loss"]).backward()
        return {k: v.detach() for k, v in metrics.items()}

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
    metrics = loss_fn(video, text, logit_scale, rest)
    scale(metrics["loss"]).backward()

    size = micro_batches[0]["video"].shape[0]
    logit_scale_grad = torch.zeros_like(logit_scale) if logit_scale.grad is None else logit_scale.grad
    for i, batch in enumerate(micro_batches):
        rows, is_last = slice(i * size, (i + 1) * size), i == len(micro_batches) - 1
        # DDP averages over the processes once, in the backward pass of the last micro-batch.
        silent = model.no_sync() if bare is not model and not is_last else contextlib.nullcontext()
        with silent:
            with generators[i].replayed(), precision.autocast():
                v, t, s = model(batch["video"], batch["tokens"])
            surrogate = (v * video.grad[rows]).sum() + (t * text.grad[rows]).sum()
            # The logit scale is one parameter for all micro-batches, and receives its gradient once.
            (surrogate + s * (logit_scale_grad if is_last else torch.zeros_like(logit_scale_grad))).backward()
    return {k: v.detach() for k, v in metrics.items()}


def supervised_step(
    model: nn.Module,
    micro_batches: Sequence[dict[str, Any]],
    loss_fn: Callable[[torch.Tensor, dict[str, Any]], dict[str, torch.Tensor]],
    precision: Precision,
    scale: Scale,
) -> dict[str, torch.Tensor]:
    """Leave the gradients of one batch of all k·b clips in `.grad`, for a loss that is a mean over clips.

    Args:
        model: video → logits (b, classes), possibly wrapped in DDP.
        micro_batches: Each has "video" (b, 3, T, H, W).
        loss_fn: (logits (b, classes) float32, micro-batch) → dict with "loss"; each value is a mean over the b clips.
        precision: The settings of autocast.
        scale: The scaling of the loss before the backward pass (the identity, or that of a GradScaler).

    Returns:
        The means over the micro-batches of what the loss function returned, detached.
    """
    count = len(micro_batches)
    totals: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(micro_batches):
        is_last = i == count - 1
        # DDP averages over the processes once, in the backward pass of the last micro-batch.
        distributed = isinstance(model, DistributedDataParallel)
        silent = model.no_sync() if distributed and not is_last else contextlib.nullcontext()
        with silent:
            with precision.autocast():
                logits = model(batch["video"])
            metrics = loss_fn(logits.float(), batch)
            scale(metrics["loss"] / count).backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value.detach() / count
    return totals


def _concatenate(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All tensors but video and tokens, concatenated over the micro-batches."""
    first = batches[0]
    keys = [k for k, v in first.items() if isinstance(v, torch.Tensor) and k not in ("video", "tokens")]
    return {k: torch.cat([b[k] for b in batches]) for k in keys}


class Objective(Protocol):
    """What an optimizer step minimises: a loss, and what belongs to it."""

    def step(
        self, model: nn.Module, micro_batches: Sequence[dict[str, Any]], precision: Precision, scale: Scale
    ) -> dict[str, torch.Tensor]:
        """Leave the gradients of one optimizer step in `.grad`.

        Args:
            model: The model as a training step calls it, possibly wrapped in DDP.
            micro_batches: The micro-batches on the device.
            precision: The settings of autocast.
            scale: The scaling of the loss before the backward pass.

        Returns:
            The metrics of the step, 0-d tensors by name, `loss` among them.
        """

    def after_step(self, model: nn.Module) -> None:
        """Bring parameters back into their range after the optimizer step."""


@dataclass(frozen=True)
class Contrastive:
    """The objective of a two-tower model.

    Attributes:
        loss_fn: The loss, as `contrastive_step` takes it.
        log_scale_range: The range of the natural logarithm of the logit scale, where it has one.
    """

    loss_fn: LossFunction
    log_scale_range: tuple[float, float] | None = None

    def step(
        self, model: nn.Module, micro_batches: Sequence[dict[str, Any]], precision: Precision, scale: Scale
    ) -> dict[str, torch.Tensor]:
        """Leave the gradients of one optimizer step in `.grad`, as `contrastive_step` does."""
        return contrastive_step(model, micro_batches, self.loss_fn, precision, scale)

    def after_step(self, model: nn.Module) -> None:
        """Bring the logit scale back into its range."""
        if self.log_scale_range is not None:
            with torch.no_grad():
                model.logit_scale.clamp_(*self.log_scale_range)


@dataclass(frozen=True)
class Supervised:
    """The objective of a classifier.

    Attributes:
        loss_fn: The loss, as `supervised_step` takes it.
        mix: What mixes the clips of a micro-batch, if anything does.
    """

    loss_fn: Callable[[torch.Tensor, dict[str, Any]], dict[str, torch.Tensor]]
    mix: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def step(
        self, model: nn.Module, micro_batches: Sequence[dict[str, Any]], precision: Precision, scale: Scale
    ) -> dict[str, torch.Tensor]:
        """Mix the clips, and leave the gradients of one optimizer step in `.grad`, as `supervised_step` does."""
        mixed = micro_batches if self.mix is None else [self.mix(batch) for batch in micro_batches]
        return supervised_step(model, mixed, self.loss_fn, precision, scale)

    def after_step(self, model: nn.Module) -> None:
        """No parameter of a classifier has a range."""
