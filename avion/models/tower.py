"""What the project knows about a kind of video tower: the facts that each tower's own file states.

The file of a tower (timemamba.py, joint.py, lavila.py, or one of yours) describes the tower once, as a `Tower`, and
gives the description to `register_tower`. The registry, the loading of checkpoints, initial weights from image models,
and features of long videos ask the description.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from .config import ModelConfig
from .stream import Stem, Stream
from .transformer import TextParts

Weights = Mapping[str, Tensor]
# Reads the shape of a parameter, which must have that many dimensions; None where the parameter is absent.
ShapeReader = Callable[[str, int], "tuple[int, ...] | None"]


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint of one program keeps the parameters that tell its sizes.

    All names are canonical (`avion.weights.layouts.canonical`).

    Attributes:
        name: The layout's name; the layout of a tower has the tower's name.
        requires: Beginnings of names. The checkpoint must have all of them.
        excludes: Beginnings of names. The checkpoint must have none of them.
        position: The position embedding, (..., 1 + N, D).
        patches: The patch embedding, (D, C, P, P).
        blocks: The beginning of the names of the video blocks, up to the block's number.
        text: The beginning of the names of the text tower.
        projection: The video projection, (D, E).
        temporal: The temporal embedding, (..., T, D), where the layout has one.
        act_layer: The activation with which the layout's program trains; None where programs differ.
        norm_style: The normalisation of the video with which the layout's program trains.
    """

    name: str
    requires: tuple[str, ...]
    excludes: tuple[str, ...]
    position: str
    patches: str
    blocks: str
    text: str
    projection: str
    temporal: str | None
    act_layer: str | None
    norm_style: str

    def fits(self, names: Collection[str]) -> bool:
        """Return whether a checkpoint with these canonical names is in this layout."""
        has = {start: any(name.startswith(start) for name in names) for start in (*self.requires, *self.excludes)}
        return all(has[start] for start in self.requires) and not any(has[start] for start in self.excludes)


class Stack(NamedTuple):
    """The parts of a tower that was built, in the order in which they are computed.

    A projection into the embedding that both towers share is none of these parts.

    Attributes:
        before: The embeddings, and the norm in front of the blocks.
        blocks: The blocks from the first to the last.
        behind: What follows the last block, such as the last norm.
    """

    before: Sequence[nn.Module | nn.Parameter]
    blocks: Sequence[nn.Module]
    behind: Sequence[nn.Module | nn.Parameter]


def clip_text_stack(text: TextParts) -> Stack:
    """Return the parts of CLIP's text tower, whichever module holds them."""
    return Stack([text.token_embedding, text.positional_embedding], text.transformer.blocks(), [text.ln_final])


def _text_stack(model: Any) -> Stack:
    return clip_text_stack(model.textual)


def _nothing_ignored(config: ModelConfig) -> dict[str, str]:
    return {}


def _no_further_sizes(weights: Weights, shape: ShapeReader, width: int) -> dict[str, Any]:
    return {}


def _any_model(config: ModelConfig, weights: Weights) -> bool:
    return True


def _unchanged(weights: Weights) -> dict[str, Tensor]:
    return dict(weights)


_NO_NAME = re.compile(r"(?!)")


@dataclass(frozen=True)
class Tower:
    """A kind of video tower.

    The *common names* are those of the divided tower (timemamba.py): weights of image models and of other towers are
    first renamed to the common names, and from there to the names of the tower that needs them.

    Attributes:
        name: The value of `ModelConfig.tower`.
        module: The class of the tower itself, `model.visual`.
        build: Makes the whole model with both towers from a configuration.
        layout: How checkpoints of this tower are laid out; None where only this project writes such checkpoints.
        choices: The fields of `ModelConfig` that are choices of this tower and that no shape shows.
        ignored: The fields that a configuration of this tower ignores, each with the reason. In such a field any other
            value than the default is refused.
        could_be: Whether weights of this layout can belong to a model with this configuration, whatever their sizes.
        further_sizes: Fields of `ModelConfig` that the shapes of this layout tell, beside the usual ones; the third
            argument is the width.
        from_common: Renames and reshapes weights with common names for this tower; None where initial weights of other
            models do not fit this tower.
        to_common: The inverse, where other towers may start from this tower's checkpoints.
        temporal: Matches the beginnings of the names of all parameters that image models do not have.
        time_from_lavila: Which temporal parts of LaViLa's checkpoint, by the names of this tower, a model of this
            configuration takes.
        video_stack: The parts of `module`; None where the tower does not tell them, and its blocks cannot be locked.
        text_stack: The parts of the text tower of the whole model.
        stem: The parts before the blocks, for the walk over long videos.
        walk: Computes the features of a long video in bounded memory, (1, D), equal to `module.features`.
        bytes_beside: What `walk` holds beside the stream of tokens, in bytes per element; the second argument is the
            size of an element in the autocast dtype.
    """

    name: str
    module: type[nn.Module]
    build: Callable[[ModelConfig], nn.Module]
    layout: Layout | None = None
    choices: tuple[str, ...] = ()
    ignored: Callable[[ModelConfig], dict[str, str]] = _nothing_ignored
    could_be: Callable[[ModelConfig, Weights], bool] = _any_model
    further_sizes: Callable[[Weights, ShapeReader, int], dict[str, Any]] = _no_further_sizes
    from_common: Callable[[Weights], dict[str, Tensor]] | None = _unchanged
    to_common: Callable[[Weights], dict[str, Tensor]] | None = None
    temporal: re.Pattern[str] = _NO_NAME
    time_from_lavila: Callable[[ModelConfig], re.Pattern[str]] = field(default=lambda config: _NO_NAME)
    video_stack: Callable[[Any], Stack] | None = None
    text_stack: Callable[[Any], Stack] = field(default=_text_stack)
    stem: Callable[[Any], Stem] | None = None
    walk: Callable[[Any, Stream], Tensor] | None = None
    bytes_beside: Callable[[ModelConfig, int], int] = field(default=lambda config, small: small)


TOWERS: dict[str, Tower] = {}


def register_tower(tower: Tower) -> None:
    """Make a kind of tower known under its name.

    Raises:
        ValueError: The name is taken.
    """
    if tower.name in TOWERS:
        raise ValueError(f"tower {tower.name!r} is already registered")
    TOWERS[tower.name] = tower


def towers() -> list[Tower]:
    """Return all towers, in the order of their registration."""
    from . import built_in  # noqa: F401  (registers the towers of this project)

    return list(TOWERS.values())


def find_tower(name: str) -> Tower | None:
    """Return the tower of this name; None if no tower of this name is registered."""
    return next((tower for tower in towers() if tower.name == name), None)


def tower_of(visual: object) -> Tower | None:
    """Return the description of a video tower that was built; None for a module of another kind."""
    return next((tower for tower in towers() if isinstance(visual, tower.module)), None)


def rename(weights: Weights, rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Rename every parameter by the first rule whose pattern matches the beginning of its name.

    Args:
        weights: Tensors by name.
        rules: Pairs of a regular expression and the text that replaces the match.

    Returns:
        The tensors by their new names.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            if match := re.match(pattern, name):
                name = match.expand(replacement) + name[match.end() :]
                break
        renamed[name] = value
    return renamed
