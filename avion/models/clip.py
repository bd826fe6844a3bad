"""CLIP's two towers in one module, and the video classifier.

The letters of the shapes are those of transformer.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from .config import ModelConfig
from .names import rename_to_ours
from .transformer import project

_OF_THE_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def _open(where: str | Path, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The checkpoint, and the fields of the configuration among the arguments of `from_pretrained`."""
    from avion.weights import hub

    download = {name: more[name] for name in _OF_THE_HUB if name in more}
    return hub.open_pretrained(where, download), {k: v for k, v in more.items() if k not in download}


class VideoTower(Protocol):
    """The interface of a video tower, which is an `nn.Module`.

    Attributes:
        width: The number of channels of the features, D.
        image_projection: The matrix (D, E) to the embedding that both towers share; None where the model holds the
            matrix, or where a classifier needs none.
    """

    width: int
    image_projection: nn.Parameter | None

    def __call__(self, video: torch.Tensor, /) -> torch.Tensor:
        """Encode a video: (B, C, T, height, width) → (B, E), or (B, D) without the projection."""
        ...

    def features(self, video: torch.Tensor) -> torch.Tensor:
        """Return the CLS after the last norm: (B, C, T, height, width) → (B, D)."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """`nn.Module.parameters`."""
        ...


class _TakesUpstreamNames(nn.Module):
    """A model whose `load_state_dict` also takes upstream's names of parameters (names.py).

    Arguments, result and errors are those of PyTorch. An error also names `load_checkpoint`, which resizes embeddings
    and says what to do.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error}\n\tavion.models.load_checkpoint(model, path) loads a file of any layout of "
                "docs/checkpoints.md, resizes embeddings, and says in one line why a file does not fit."
            ) from error

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **more: Any) -> None:
        """Rename the entries of this module. PyTorch calls this before it loads the parts, inside
        DistributedDataParallel too.
        """
        parameters = self.named_parameters(remove_duplicate=False)
        buffers = self.named_buffers(remove_duplicate=False)
        rename_to_ours(state_dict, prefix, {name for name, _ in [*parameters, *buffers]})
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


class _Travels(PyTorchModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of the Hugging Face hub, in this project's format.

    The work is done in `avion.weights.hub`, which lies above the models.

    Attributes:
        preprocess: How the input is normalised: {"norm_style", "mean", "std"}. None in a model that was not loaded.
    """

    preprocess: dict[str, Any] | None = None

    def save_pretrained(self, save_directory: str | Path, *, norm_style: str = "", **more: Any) -> str | None:
        """Write config.json, model.safetensors and a card (README.md) into a folder.

        Args:
            save_directory: The folder, which is made.
            norm_style: How the input is normalised, where the model does not know it yet.
            more: Arguments of `PyTorchModelHubMixin.save_pretrained`. `model_card_kwargs` are those of
                `avion.weights.hub.card`: recipe, metrics, licence, title.

        Returns:
            The address of the commit, with push_to_hub=True.

        Raises:
            UserError: The model does not know how its input is normalised.
        """
        from avion.weights import hub

        if norm_style:
            self.preprocess = hub.preprocess_of(norm_style)
        return super().save_pretrained(save_directory, **more)

    def _save_pretrained(self, save_directory: Path) -> None:
        from avion.weights import hub

        hub.write_folder(cast("nn.Module", self), save_directory)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """The card that `save_pretrained` writes where there is none."""
        from avion.weights import hub

        return hub.card(cast("nn.Module", self), *args, **kwargs)


class CLIP(_TakesUpstreamNames, _Travels):
    """A video tower and a text tower with one embedding space (arXiv 2103.00020).

    `visual` maps (B, C, T, height, width) to (B, E), and `textual` maps (B, L) to (B, E).
    """

    def __init__(self, visual: VideoTower, textual: nn.Module | None, config: ModelConfig):
        super().__init__()
        self.config = config
        self.visual: VideoTower = visual
        if textual is not None:
            self.textual = textual
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(1 / config.temperature_init)), requires_grad=not config.freeze_temperature
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **more: Any) -> "CLIP":
        """The model of a folder or repository that `save_pretrained` or `push_to_hub` wrote, in evaluation mode.

        Args:
            pretrained_model_name_or_path: A folder, or owner/repo on the hub.
            more: revision, token, cache_dir, force_download and local_files_only of the hub; fields of the
                configuration to change, as in `model_from_checkpoint`.

        Raises:
            UserError: There is no such model, or it is a classifier.
        """
        checkpoint, fields = _open(pretrained_model_name_or_path, more)
        return checkpoint.build(**fields).eval()

    def encode_image(self, video: torch.Tensor) -> torch.Tensor:
        """Embed videos, (B, C, T, height, width) float, normalised → (B, E). The embeddings are not unit vectors."""
        return self.visual(video)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed texts, (B, L) int64 with L at most the context length → (B, E). The embeddings are not unit vectors."""
        return self.textual(tokens)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Project the tower's features (B, D) to the embedding that both towers share, (B, E)."""
        return project(features, self.visual.image_projection)

    def forward(self, video: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embed videos and texts.

        Args:
            video: (B, C, T, height, width) float, normalised.
            tokens: (B, L) int64.

        Returns:
            The embeddings of the videos and of the texts, unit vectors (B, E) each, and the logit scale, 0-d.
        """
        video_embed = F.normalize(self.encode_image(video), dim=-1)
        text_embed = F.normalize(self.encode_text(tokens), dim=-1)
        return video_embed, text_embed, self.logit_scale.exp()

    def no_weight_decay(self) -> set[str]:
        """Return the full names of the matrices that take no weight decay."""
        return _state_matrices(self)


class VideoClassifier(_TakesUpstreamNames, _Travels):
    """A video tower with one linear head: (B, C, T, height, width) → logits (B, num_classes).

    Args:
        vision_model: The `visual` of any registered model. Its projection into the shared embedding is removed; the
            head reads the CLS after the last norm, `vision_model.width` channels.
        dropout: The dropout rate before the head.
        num_classes: The number of classes.
        config: The configuration of the two-tower model to which the tower belongs. It is written into checkpoints
            (`avion.weights.head`).
        actions: What the classes stand for. They are written into checkpoints as well.
    """

    def __init__(
        self,
        vision_model: VideoTower,
        dropout: float,
        num_classes: int,
        config: ModelConfig | None = None,
        actions: Sequence[str] | None = None,
    ):
        super().__init__()
        self.config = config
        self.actions = None if actions is None else tuple(actions)
        self.visual: VideoTower = vision_model
        self.visual.image_projection = None
        self.dropout = nn.Dropout(dropout)
        self.fc_cls = nn.Linear(vision_model.width, num_classes)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.zeros_(self.fc_cls.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **more: Any) -> "VideoClassifier":
        """The classifier of a folder or repository, in evaluation mode. Arguments as of `CLIP.from_pretrained`."""
        checkpoint, fields = _open(pretrained_model_name_or_path, more)
        return checkpoint.build_classifier(**fields).eval()

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return self.fc_cls(self.dropout(self.visual(video)))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Return the tower's features (B, D) as they are, because a classifier has no shared embedding."""
        return features

    def no_weight_decay(self) -> set[str]:
        """Return the full names of the matrices that take no weight decay."""
        return _state_matrices(self)


def _state_matrices(module: nn.Module) -> set[str]:
    """Return the names of the selective scans' A in both directions: weight decay would pull every state to the same
    memory.
    """
    return {name for name, _ in module.named_parameters() if name.endswith(("A_log", "A_b_log"))}
