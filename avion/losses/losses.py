"""Losses over the global batch of a two-tower model, with AVION's arguments.

Legend: B clips per process, W processes, E width of the embedding.
"""

import logging

import torch
import torch.nn.functional as F
from torch import nn

from avion.errors import UserError

from .gather import gather_features, world

logger = logging.getLogger(__name__)


class _GlobalBatchLoss(nn.Module):
    """What both losses need in order to see the features of all processes."""

    def __init__(self, local_loss: bool, gather_with_grad: bool, rank: int, world_size: int, use_horovod: bool):
        super().__init__()
        name = type(self).__name__
        if use_horovod:
            raise UserError(f"{name}: use_horovod=True is not supported; processes meet through torch.distributed")
        if not 0 <= rank < world_size:
            raise UserError(f"{name}: rank={rank} of world_size={world_size} does not exist; ranks begin at 0")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size = rank, world_size

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """Gather (B, E) of this process to (W·B, E) of all processes."""
        if self.world_size == 1:
            return features
        rank, size = world()
        if (rank, size) != (self.rank, self.world_size):
            found = f"rank {rank} of a process group of {size}" if size > 1 else "no process group"
            raise UserError(
                f"{type(self).__name__}: rank={self.rank}, world_size={self.world_size}, but there is {found}; "
                "give the process's own, or leave both out for the pairs of one process alone"
            )
        if self.gather_with_grad:
            return gather_features(features, "sum")
        return gather_features(features, "own" if self.local_loss else "copies")

    def check_pairs(self, image_features: torch.Tensor, text_features: torch.Tensor) -> None:
        """Check the shapes.

        Raises:
            UserError: The features are not both (B, E).
        """
        images, texts = tuple(image_features.shape), tuple(text_features.shape)
        if len(images) != 2 or images != texts:
            raise UserError(
                f"{type(self).__name__}: features of one shape (B, E) are required, found {images} and {texts}"
            )

    def first_row(self, rows: int) -> int:
        """Return the first row of the global batch for which the loss is computed."""
        return self.rank * rows if self.local_loss else 0


class ClipLoss(_GlobalBatchLoss):
    """The mean of the two cross-entropies over logit_scale · V Tᵀ (CLIP, arXiv 2103.00020).

    The positives are on the diagonal; the negatives come from all processes.

    Args:
        local_loss: Whether each process computes its own B rows and B columns instead of all W·B. Averaged over
            processes, loss and gradients are the same; less is computed.
        gather_with_grad: Whether gradients flow into the features of the other processes. Without it and with
            `local_loss`, the features of a process learn only from the process's own rows and columns. Without
            `local_loss` it makes no difference, because every process sees the whole loss.
        cache_labels: Whether the labels of the last batch are kept for the next batch of the same size.
        rank: The number of this process in the process group.
        world_size: W. With 1, the default, nothing is gathered: the pairs are those of this process.
        use_horovod: Refused if true.

    Raises:
        UserError: The rank does not exist; or, when the loss is called, there is no such process group.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, rank, world_size, use_horovod)
        self.cache_labels = cache_labels
        self._labels: torch.Tensor | None = None

    def forward(self, image_features, text_features, logit_scale) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            image_features: Unit vectors, (B, E).
            text_features: Unit vectors, (B, E).
            logit_scale: 0-d, after the exponential.

        Returns:
            `loss`, 0-d float32 (float64 of float64 features), which is this process's share with `local_loss`; and
                `clip_acc`, the percentage of clips in this process's rows whose own text scores highest.
        """
        self.check_pairs(image_features, text_features)
        image_features, text_features = _wide(image_features), _wide(text_features)
        all_images, all_texts = self.gather(image_features), self.gather(text_features)  # (W·B, E)
        with torch.autocast(image_features.device.type, enabled=False):
            if self.local_loss:
                per_image = logit_scale * image_features @ all_texts.T  # (B, W·B)
                per_text = logit_scale * text_features @ all_images.T  # (B, W·B)
            else:
                per_image = logit_scale * all_images @ all_texts.T  # (W·B, W·B)
                per_text = per_image.T
            labels = self.labels(per_image)
            loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        accuracy = 100.0 * (per_image.detach().argmax(dim=-1) == labels).float().mean()
        return {"loss": loss, "clip_acc": accuracy}

    def labels(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the column of each row's own pair: logits (R, W·B) → (R,) int64."""
        rows, device = len(logits), logits.device
        kept = self._labels
        if kept is not None and len(kept) == rows and kept.device == device:
            return kept
        labels = torch.arange(rows, device=device) + self.first_row(rows)
        # A tensor that was made in inference mode would make the next backward pass fail.
        self._labels = labels if self.cache_labels and not labels.is_inference() else None
        return labels


class MaxMarginRankingLoss(_GlobalBatchLoss):
    """The bidirectional max-margin ranking loss of the global batch (Frozen in Time, arXiv 2104.00650).

    With S_ij the cosine of text i and clip j, n = W·B, and w_i the weight of pair i (1 without weights):

        loss = 1 / (2 n (n - 1)) · sum over i ≠ j of w_i · [relu(margin - S_ii + S_ij) + relu(margin - S_ii + S_ji)]

    So w_i scales both terms of pair i: its text against the clips of the other pairs, and its clip against their texts.
    The sum is divided by the number of terms, not by the weights: a batch of small weights gives a small loss.

    Args:
        margin: In units of the cosine.
        fix_norm: Whether the diagonal is left out, as above. Otherwise i = j counts too, each time with the margin
            itself, and the sum is divided by 2 n².
        local_loss: As in `ClipLoss`; the rows of a process are its own pairs i.
        gather_with_grad: As in `ClipLoss`.
        rank: As in `ClipLoss`.
        world_size: As in `ClipLoss`.
        use_horovod: As in `ClipLoss`.
        weighted: Whether the loss uses the weights that it is called with. AVION's scripts pass relevancies, which
            AVION's loss ignores. The published models were trained with that loss, so False is the default.

    Raises:
        UserError: As in `ClipLoss`.
    """

    def __init__(
        self,
        margin: float = 0.2,
        fix_norm: bool = True,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        weighted: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, rank, world_size, use_horovod)
        self.margin, self.fix_norm, self.weighted = margin, fix_norm, weighted
        self._warned = False

    def forward(self, image_features, text_features, weight=None) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            image_features: (B, E), of any length.
            text_features: (B, E), of any length.
            weight: (B,), not negative, or None.

        Returns:
            `loss`, 0-d float32 (float64 of float64 features), which is this process's share with `local_loss`; and
                `max_margin_loss`, the same number without gradient.
        """
        self.check_pairs(image_features, text_features)
        weight = self._weight(weight, len(image_features))
        device = image_features.device.type
        with torch.autocast(device, enabled=False):
            images, texts = (F.normalize(_wide(x), dim=-1, eps=1e-8) for x in (image_features, text_features))
            all_images, all_texts = self.gather(images), self.gather(texts)  # (W·B, E)
            first_row = self.first_row(len(images))
            if not self.local_loss:
                images, texts = all_images, all_texts  # (R, E), R rows: B or W·B
                weight = None if weight is None else self.gather(weight[:, None])[:, 0]
            per_text = texts @ all_images.T  # (R, W·B)
            per_image = images @ all_texts.T  # (R, W·B)
            own = per_text.diagonal(first_row)[:, None]  # (R, 1)
            pairs = F.relu(self.margin - own + per_text) + F.relu(self.margin - own + per_image)
            if weight is not None:
                pairs = pairs * weight[:, None]
            rows, columns = pairs.shape
            if not self.fix_norm:
                loss = pairs.sum() / (2 * rows * columns)
            else:
                column = torch.arange(columns, device=pairs.device)
                is_own = column[:rows, None] + first_row == column  # (R, W·B)
                loss = pairs.masked_fill(is_own, 0.0).sum() / (2 * rows * max(columns - 1, 1))
        return {"loss": loss, "max_margin_loss": loss.detach()}

    def _weight(self, weight: torch.Tensor | None, pairs: int) -> torch.Tensor | None:
        if weight is None:
            return None
        if weight.shape != (pairs,):
            raise UserError(
                f"MaxMarginRankingLoss: weights of shape ({pairs},) are required, found {tuple(weight.shape)}"
            )
        if self.weighted:
            return weight.float()
        if not self._warned:
            logger.warning("MaxMarginRankingLoss: the weights are not used, as in AVION; weighted=True uses them")
            self._warned = True
        return None


def _wide(features: torch.Tensor) -> torch.Tensor:
    """The features in the precision that the loss is computed in: float32 at least."""
    return features.to(torch.promote_types(features.dtype, torch.float32))
