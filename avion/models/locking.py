"""Towers of which only the last blocks are trained (LiT, arXiv 2111.07991; `--lock-video`, `--lock-text`).

A locked tower trains its last N blocks and what follows them: the last norm, where N is above 0, and in any case the
projection into the embedding that both towers share. All before is frozen: it gets no gradient, no state of the
optimizer and no weight decay. Nothing below the first part that is trained is kept for the backward pass.
"""

import contextlib
from collections.abc import Collection, Iterator

from torch import nn

from avion.errors import UserError

from .tower import Stack, tower_of
from .utils import is_time_gate

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def lock_towers(
    model: nn.Module, video: int | None = None, text: int | None = None, except_for: Collection[str] = ()
) -> None:
    """Freeze all but the last blocks of one tower or of both.

    Args:
        model: A two-tower model or a classifier, on any device, before its optimizer is built.
        video: How many of the last blocks of the video tower are trained; None leaves the tower as it is.
        text: How many of the last blocks of the text tower are trained; None leaves the tower as it is.
        except_for: What is trained in the frozen part too: "gates" (α of the blocks) and "norms" (scales and biases of
            normalisation layers).

    Raises:
        UserError: A tower has fewer blocks, or does not tell its blocks, or a locked tower has nothing of the kind that
            `except_for` names.
    """
    frozen: list[tuple[str, nn.Parameter]] = []
    if video is not None:
        frozen += _frozen(model, _stack(model, "video", video), video)
    if text is not None:
        frozen += _frozen(model, _stack(model, "text", text), text)
    kept = {kind: _of_kind(model, kind) for kind in except_for}
    for kind, names in kept.items():
        if not any(name in names for name, _ in frozen):
            raise UserError(f"--lock-except {kind}: what is locked has no {kind}; leave {kind} out")
    for name, parameter in frozen:
        if not any(name in names for names in kept.values()):
            parameter.requires_grad_(False)


def _stack(model: nn.Module, which: str, last: int) -> Stack:
    flag = f"--lock-{which} {last}"
    tower = tower_of(model.visual)
    video_stack = None if tower is None else tower.video_stack
    if tower is None or (which == "video" and video_stack is None):
        kind = type(model.visual).__name__
        raise UserError(f"{flag}: tower {kind} does not tell its blocks; give video_stack= to its Tower")
    try:
        stack = video_stack(model.visual) if which == "video" and video_stack else tower.text_stack(model)
    except AttributeError as e:
        raise UserError(f"{flag}: {e}, so the {which} tower has other parts; give {which}_stack= to its Tower") from e
    if last > len(stack.blocks):
        raise UserError(f"{flag}: the {which} tower has {len(stack.blocks)} blocks; give a number from 0 to that")
    return stack


def _frozen(model: nn.Module, stack: Stack, last: int) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are frozen where the last blocks are trained, with their names."""
    parts = [*stack.before, *stack.blocks[: len(stack.blocks) - last], *(() if last else stack.behind)]
    frozen = {id(p) for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])}
    return [(name, p) for name, p in model.named_parameters() if id(p) in frozen]


def _of_kind(model: nn.Module, kind: str) -> set[str]:
    """The names of all gates, or of all parameters of norms."""
    if kind == "gates":
        return {name for name, _ in model.named_parameters() if is_time_gate(name)}
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _NORMS)]
    return {f"{name}.{own}" for name, module in norms for own, _ in module.named_parameters(recurse=False)}


def train_mode(model: nn.Module, wrapped: nn.Module) -> None:
    """Put a model into training mode, but for the blocks of which nothing is trained.

    Such blocks compute what they compute in evaluation, without drop path and dropout.

    Args:
        model: The model itself.
        wrapped: The same model as it is called: compiled, or in DDP.
    """
    wrapped.train()
    for block in _all_blocks(model):
        if not any(p.requires_grad for p in block.parameters()):
            block.eval()


def _all_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of both towers, as far as the towers tell them."""
    tower = tower_of(model.visual)
    if tower is None:
        return
    if tower.video_stack is not None:
        yield from tower.video_stack(model.visual).blocks
    if hasattr(model, "encode_text"):  # a classifier has no text tower
        with contextlib.suppress(AttributeError):  # a text tower of another kind, which cannot be locked either
            yield from tower.text_stack(model).blocks


def parameter_counts(model: nn.Module) -> str:
    """Return one line with the numbers of all, trained and frozen parameters, of the model and of each tower."""
    counts: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        for part in ("all", _part(name)):
            count = counts.setdefault(part, [0, 0])
            count[0] += p.numel()
            count[1] += p.numel() if p.requires_grad else 0

    def shown(part: str) -> str:
        total, trained = counts[part]
        return f"{total:,} ({trained:,} trained, {total - trained:,} frozen)"

    parts = [f"{part} {shown(part)}" for part in (*_PARTS, "other parts") if part in counts]
    return f"parameters: {shown('all')}; {', '.join(parts)}"


# The beginnings of the names of each part. LaViLa's model itself holds one projection and the parts of its text tower.
_PARTS = {
    "video tower": ("visual.", "image_projection"),
    "text tower": (
        "textual.", "token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection"
    ),
    "logit scale": ("logit_scale",),
    "head": ("fc_cls.",),
}  # fmt: skip


def _part(name: str) -> str:
    return next((part for part, starts in _PARTS.items() if name.startswith(starts)), "other parts")
