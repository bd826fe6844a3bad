"""A checkpoint, opened once: its weights, what it says about itself, its head, and the state of the training.

What loads, and what is reported, is described in docs/checkpoints.md.
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
        due: The line of log.txt of the epoch before, while the evaluation of that epoch was still to come.
        clips: The clips of that epoch that were trained on, None in files of earlier versions.
        so_far: The sums from which the means of that epoch come, empty at its beginning and in files of earlier
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
    due: dict[str, Any] | None
    clips: int | None
    so_far: Mapping[str, Any]
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
        """A checkpoint of contents that are at hand; `Checkpoint.open` reads a file.

        Raises:
            UserError: There are no weights among the contents.
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
                refused; without it, weights are read when they are used, and damage to them is not noticed.

        Raises:
            UserError: One line, for a file that is missing, damaged, foreign, or asks for anything but data.
        """
        name = os.fspath(path)
        return cls(read_checkpoint(name, verify=verify), name)

    @functools.cached_property
    def facts(self) -> CheckpointFacts:
        """What the checkpoint says about its model and the input that the model was trained on.

        Raises:
            UserError: A field holds something impossible.
        """
        return facts_of(self.contents, self.weights, self.path)

    @property
    def args(self) -> dict[str, Any]:
        """The command line of the program that wrote the checkpoint, empty if it is not there."""
        return saved_args(self.contents)

    @property
    def is_classifier(self) -> bool:
        """Whether the checkpoint is a fine-tuned classifier's: a video tower and a head, no text tower."""
        return is_classifier(self.weights)

    @functools.cached_property
    def head(self) -> Head:
        """The classes of a fine-tuned classifier.

        Raises:
            UserError: The checkpoint is another model's, or its list of actions does not fit its weights.
        """
        return read_head(self.contents, self.weights, self.path)

    @property
    def training(self) -> TrainingState | None:
        """The state of the run that wrote the checkpoint, None where the file holds weights alone."""
        found = self.contents
        if found.get("optimizer") is None:
            return None
        best, due = found.get("best_acc1"), found.get("due")
        return TrainingState(
            optimizer=found["optimizer"],
            scaler=found.get("scaler") or {},
            epoch=int(found.get("epoch", 0)),
            step=int(found.get("step", 0)),
            best=None if best is None else float(best),
            rng=found.get("rng") or [],
            due=due if isinstance(due, dict) else None,
            clips=None if found.get("clips") is None else int(found["clips"]),
            so_far=_sums(found.get("so_far")),
            logs=found.get("logs") or {},
            began_from=str(found.get("began_from", self.args.get("resume") or "")),
            data=found.get("data") or {},
        )

    def describe(self) -> str:
        """What is known of the model, the head and the training state, in lines for the screen.

        Raises:
            UserError: A field holds something impossible.
        """
        extra = {}
        if self.is_classifier:
            extra["head"] = f"a classifier of {self.head.num_classes} classes"
        if (state := self.training) is not None:
            extra["training state"] = f"epoch {state.epoch}, {state.step} optimizer steps done in it"
        return described_checkpoint(self.contents, self.weights, self.facts, extra)

    def check_norm_style(self, norm_style: str) -> None:
        """Raise UserError if the weights were trained on input that was normalised in another way.

        Says nothing where the checkpoint does not tell.
        """
        check_preprocess(self.facts, norm_style)

    def load(self, model: nn.Module, *, strict: bool = True) -> LoadReport:
        """Load the weights into `model`, in place.

        Takes every layout of docs/checkpoints.md but image CLIPs (see `avion.weights.load_pretrained`). Temporal and
        position embeddings are resized to the model's.

        Args:
            model: A model of the same sizes.
            strict: Whether entries that only one side has, and a checkpoint of another activation, residual, mixer or
                number of heads, are refused. If False they are reported. Other shapes are refused either way.

        Raises:
            UserError: One line, and then the model is as it was.
        """
        return load_weights(model, self.weights, self.facts, self.path, strict=strict)

    def build(self, *, name: str | None = None, **overrides: Any) -> CLIP:
        """Build the two-tower model that the checkpoint says it is and load it; the report is `model.load_report`.

        Our own checkpoints carry their config; how the model was run (kernels, dropout, gradient checkpointing) is
        not taken over. Of upstream's, the sizes come from the shapes; heads are width / 64, since no shape shows them.

        Args:
            name: The model's name, where the checkpoint does not say it: else it comes from `args.model`, else from
                the layout where that is unambiguous.
            overrides: Fields of `ModelConfig`, which win over what the checkpoint says; other numbers of frames and
                other image sizes resize the embeddings. A file that says no number of frames (bare weights of a tower
                without temporal embedding) needs `num_frames`.

        Raises:
            UserError: The file does not say enough (the message names the override that is needed), or it is a
                classifier's.
        """
        if self.is_classifier:
            raise UserError(f"{self.path}: is a fine-tuned classifier without a text tower, a dual encoder is needed")
        chosen, fields = described_model(self.contents, self.weights, self.facts, name, overrides)
        model = create_model(chosen, **fields)
        model.load_report = self.load(model)
        model.preprocess = self.facts.preprocess()
        return model

    def build_classifier(self, *, name: str | None = None, dropout: float = 0.0, **overrides: Any) -> VideoClassifier:
        """Build the classifier that the checkpoint holds and load it; the report is `model.load_report`.

        Args:
            name: As in `build`. Vanilla and Frozen, and space-time towers, have the same parameters, so upstream's
                files of divided towers need it.
            dropout: The dropout before the head.
            overrides: As in `build`.

        Raises:
            UserError: As `build`, and where the checkpoint has no head.
        """
        head = self.head
        chosen, fields = described_model(self.contents, self.weights, self.facts, name, overrides)
        towers = create_model(chosen, **fields)
        model = VideoClassifier(towers.visual, dropout, head.num_classes, config=towers.config, actions=head.actions)
        model.load_report = self.load(model)
        model.preprocess = self.facts.preprocess()
        return model


def _sums(found: Any) -> dict[str, Any]:
    """The sums of an epoch if they are what this project writes, else none."""
    try:
        meters = {str(name): [float(total), float(count)] for name, (total, count) in found["meters"].items()}
        numbers = {name: float(found[name]) for name in ("seconds", "waited")}
        counts = {name: int(found[name]) for name in ("clips", "skipped", "replaced")}
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return {}
    return {"meters": meters, **numbers, **counts}


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> LoadReport:
    """`Checkpoint.open(path).load(model)`."""
    return Checkpoint.open(path).load(model, strict=strict)


def model_from_checkpoint(path: str | os.PathLike[str], *, name: str | None = None, **overrides: Any) -> CLIP:
    """`Checkpoint.open(path).build()`: the two-tower model that a checkpoint says it is, in evaluation mode."""
    return Checkpoint.open(path).build(name=name, **overrides).eval()


def classifier_from_checkpoint(
    path: str | os.PathLike[str], *, name: str | None = None, dropout: float = 0.0, **overrides: Any
) -> VideoClassifier:
    """`Checkpoint.open(path).build_classifier()`: the classifier that a checkpoint holds, in evaluation mode."""
    return Checkpoint.open(path).build_classifier(name=name, dropout=dropout, **overrides).eval()
