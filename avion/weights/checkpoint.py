"""A checkpoint, opened once: its weights, what it says about itself, its classifier head, and its training state.

docs/checkpoints.md describes which files load, and what the load report says.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from avion.errors import UserError
from avion.models.clip import CLIP, VideoClassifier
from avion.models.registry import create_model

from .description import described_checkpoint, described_model
from .facts import CheckpointFacts, check_preprocess, facts_of, saved_args
from .files import checkpoint_state_dict, read_checkpoint
from .head import Head, is_classifier, read_head
from .layouts import canonical
from .loading import LoadReport, load_weights


@dataclass(frozen=True)
class TrainingState:
    """What a training run stored beside the weights, as it stands in the file.

    Attributes:
        optimizer: The optimizer's state.
        scaler: The state of the loss scaler, empty where there was none.
        epoch: The epoch that the run was in.
        step: The optimizer steps done in that epoch.
        best: The best value of the task's metric so far, None where none was stored.
        rng: The states of the random generators, one entry per process.
        pending: The line of log.txt of the epoch before, while the evaluation of that epoch was still to come.
        clips: The clips of that epoch that were trained on, None in files of earlier versions.
        sums: The sums from which the means of that epoch come, empty at its beginning and in files of earlier
            versions.
        logs: How long the logs were, empty in files of earlier versions.
        began_from: The checkpoint that the run began from (its --resume), empty where there was none.
        data: What identifies the clips of the run, empty in files of earlier versions.
    """

    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]
    epoch: int
    step: int
    best: float | None
    rng: list[Any]
    pending: dict[str, Any] | None
    clips: int | None
    sums: Mapping[str, Any]
    logs: Mapping[str, Any]
    began_from: str
    data: Mapping[str, Any]


class Checkpoint:
    """A checkpoint that was opened.

    Attributes:
        path: Where it was opened from, for messages.
        contents: What the file holds.
        weights: The model's weights under canonical names, on the CPU, memory-mapped where the format allows it.
    """

    def __init__(self, contents: Mapping[str, Any], path: str = "checkpoint"):
        """Make a checkpoint of contents that are in memory already; `Checkpoint.open` reads a file.

        Args:
            contents: The contents, as `read_checkpoint` returns them.
            path: Where the contents come from, for messages.

        Raises:
            UserError: The contents hold no weights.
        """
        self.path = path
        self.contents = contents
        self.weights: dict[str, Tensor] = canonical(checkpoint_state_dict(contents, path), path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> "Checkpoint":
        """Read a file, or `hf:owner/repo/file` of the Hugging Face Hub, without running anything in it.

        Args:
            path: The file or the address.
            verify: Whether the whole file is read and compared with the checksums in it, so that a damaged file is
                refused. Without the comparison, weights are read when they are used, and damage to them is not noticed.

        Returns:
            The checkpoint. Its tensors are on the CPU, memory-mapped where the format allows it.

        Raises:
            UserError: The file is missing, damaged or of an unknown format, or asks for anything but data. The message
                is one line.
        """
        name = os.fspath(path)
        return cls(read_checkpoint(name, verify=verify), name)

    @functools.cached_property
    def facts(self) -> CheckpointFacts:
        """What the checkpoint says about its model and about the input that the model was trained on.

        Raises:
            UserError: A field of the checkpoint holds something impossible.
        """
        return facts_of(self.contents, self.weights, self.path)

    @property
    def args(self) -> dict[str, Any]:
        """The flags of the program that wrote the checkpoint; empty where the checkpoint does not hold them."""
        return saved_args(self.contents)

    @property
    def is_classifier(self) -> bool:
        """Whether the checkpoint is of a fine-tuned classifier: it has a video tower and a head, and no text tower."""
        return is_classifier(self.weights)

    @functools.cached_property
    def head(self) -> Head:
        """What the checkpoint says about the classes of a fine-tuned classifier.

        Raises:
            UserError: The checkpoint is not of a classifier, or the list of actions in it does not fit the weights in
                it.
        """
        return read_head(self.contents, self.weights, self.path)

    @property
    def training(self) -> TrainingState | None:
        """The training state of the run that wrote the checkpoint; None where the file holds weights alone."""
        found = self.contents
        if found.get("optimizer") is None:
            return None
        best, pending = found.get("best_acc1"), found.get("due")
        return TrainingState(
            optimizer=found["optimizer"],
            scaler=found.get("scaler") or {},
            epoch=int(found.get("epoch", 0)),
            step=int(found.get("step", 0)),
            best=None if best is None else float(best),
            rng=found.get("rng") or [],
            pending=pending if isinstance(pending, dict) else None,
            clips=None if found.get("clips") is None else int(found["clips"]),
            sums=_sums(found.get("so_far")),
            logs=found.get("logs") or {},
            began_from=str(found.get("began_from", self.args.get("resume") or "")),
            data=found.get("data") or {},
        )

    def describe(self) -> str:
        """Describe the model, the head and the training state in lines for the screen.

        Returns:
            One line per fact, joined by newlines.

        Raises:
            UserError: A field of the checkpoint holds something impossible.
        """
        extra = {}
        if self.is_classifier:
            extra["head"] = f"a classifier of {self.head.num_classes} classes"
        if (state := self.training) is not None:
            extra["training state"] = f"epoch {state.epoch}, {state.step} optimizer steps done in it"
        return described_checkpoint(self.contents, self.weights, self.facts, extra)

    def check_norm_style(self, norm_style: str) -> None:
        """Refuse another normalisation of the input than the one that the weights were trained with.

        A checkpoint that does not say how its input was normalised is not refused.

        Args:
            norm_style: The normalisation that is to be used, a key of `avion.constants.NORM_STYLES`.

        Raises:
            UserError: The weights were trained on input that was normalised in another way.
        """
        check_preprocess(self.facts, norm_style)

    def load(self, model: nn.Module, *, strict: bool = True) -> LoadReport:
        """Load the weights into `model`, in place.

        Every layout of docs/checkpoints.md is accepted, except that of image CLIPs (see
        `avion.weights.load_pretrained`). Temporal and position embeddings are resized to those of the model.

        Args:
            model: A model of the same sizes.
            strict: Whether the checkpoint is refused where an entry exists on one side only, or where the activation,
                the residual, the mixer or the number of heads differs. If False, the report lists these differences. A
                different shape is refused either way.

        Returns:
            The report of what was loaded, resized and left out.

        Raises:
            UserError: The checkpoint does not fit. The model is then unchanged. The message is one line.
        """
        return load_weights(model, self.weights, self.facts, self.path, strict=strict)

    def build(self, *, name: str | None = None, **overrides: Any) -> CLIP:
        """Build the two-tower model that the checkpoint describes, and load the weights; the report is
        `model.load_report`.

        Checkpoints of this project hold the model's configuration. Their kernels, dropout and gradient checkpointing
        are not taken over, since they say how the model was run. In upstream's checkpoints the sizes come from the
        shapes of the weights. No shape shows the number of heads: it is width / 64.

        Args:
            name: The registered name of the model, where the checkpoint does not say it. If None, the name comes from
                `args.model` in the checkpoint, or else from the layout where only one model has this layout.
            overrides: Fields of `ModelConfig`, which win over what the checkpoint says. Another number of frames or
                another image size resizes the embeddings. A file that does not say its number of frames (bare weights
                of a tower without temporal embedding) needs `num_frames`.

        Returns:
            The model, on the CPU and in training mode.

        Raises:
            UserError: The file does not say enough (the message names the override that is needed), or it is of a
                classifier.
        """
        if self.is_classifier:
            raise UserError(f"{self.path}: is a fine-tuned classifier without a text tower, a dual encoder is needed")
        chosen, fields = described_model(self.contents, self.weights, self.facts, name, overrides)
        model = create_model(chosen, **fields)
        model.load_report = self.load(model)
        model.preprocess = self.facts.preprocess()
        return model

    def build_classifier(self, *, name: str | None = None, dropout: float = 0.0, **overrides: Any) -> VideoClassifier:
        """Build the classifier that the checkpoint holds, and load the weights; the report is `model.load_report`.

        Args:
            name: The registered name of the model, as in `build`. Models with vanilla, Frozen and space-time residuals
                have the same parameters, so upstream's files of divided towers need the name.
            dropout: The probability of dropout before the head.
            overrides: Fields of `ModelConfig`, as in `build`.

        Returns:
            The classifier, on the CPU and in training mode.

        Raises:
            UserError: The file does not say enough, or the checkpoint has no head.
        """
        head = self.head
        chosen, fields = described_model(self.contents, self.weights, self.facts, name, overrides)
        towers = create_model(chosen, **fields)
        model = VideoClassifier(towers.visual, dropout, head.num_classes, config=towers.config, actions=head.actions)
        model.load_report = self.load(model)
        model.preprocess = self.facts.preprocess()
        return model


def _sums(found: Any) -> dict[str, Any]:
    """Return the sums of an epoch if they have the form that this project writes, and no sums otherwise."""
    try:
        meters = {str(name): [float(total), float(count)] for name, (total, count) in found["meters"].items()}
        numbers = {name: float(found[name]) for name in ("seconds", "waited")}
        counts = {name: int(found[name]) for name in ("clips", "skipped", "replaced")}
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return {}
    return {"meters": meters, **numbers, **counts}


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> LoadReport:
    """Load the weights of a file into a model, in place: `Checkpoint.open(path).load(model)`.

    Args:
        model: A model of the same sizes.
        path: The file, or `hf:owner/repo/file`.
        strict: As in `Checkpoint.load`.

    Returns:
        The report of what was loaded, resized and left out.

    Raises:
        UserError: The file cannot be read, or does not fit the model, which is then unchanged.
    """
    return Checkpoint.open(path).load(model, strict=strict)


def model_from_checkpoint(path: str | os.PathLike[str], *, name: str | None = None, **overrides: Any) -> CLIP:
    """Build the two-tower model that a checkpoint describes: `Checkpoint.open(path).build()`.

    Args:
        path: The file, or `hf:owner/repo/file`.
        name: As in `Checkpoint.build`.
        overrides: As in `Checkpoint.build`.

    Returns:
        The model with its weights, in evaluation mode.

    Raises:
        UserError: The file cannot be read, does not say enough, or is of a classifier.
    """
    return Checkpoint.open(path).build(name=name, **overrides).eval()


def classifier_from_checkpoint(
    path: str | os.PathLike[str], *, name: str | None = None, dropout: float = 0.0, **overrides: Any
) -> VideoClassifier:
    """Build the classifier that a checkpoint holds: `Checkpoint.open(path).build_classifier()`.

    Args:
        path: The file, or `hf:owner/repo/file`.
        name: As in `Checkpoint.build_classifier`.
        dropout: The probability of dropout before the head.
        overrides: As in `Checkpoint.build`.

    Returns:
        The classifier with its weights, in evaluation mode.

    Raises:
        UserError: The file cannot be read, does not say enough, or has no head.
    """
    return Checkpoint.open(path).build_classifier(name=name, dropout=dropout, **overrides).eval()
