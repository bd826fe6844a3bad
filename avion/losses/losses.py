"""Losses over the global batch of a two-tower model.

Legend: B clips per process, W processes, E embedding width. Features are L2-normalised.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .gather import gather_features, world


class ClipLoss(nn.Module):
    """Mean of the two cross-entropies over logit_scale · V Tᵀ (CLIP, arXiv 2103.00020).

    The positives are the diagonal; the negatives come from all processes.

    Args:
        local_loss: each process computes its own B rows and B columns instead of all W·B. Averaged over
            processes, loss and gradients are the same; less is computed.
        gather_with_grad: gradients flow into the features of the other processes. Without it and with
            `local_loss`, a process's features learn only from its own rows and columns. Without
            `local_loss` the result is the same either way, since every process sees the whole loss.

    `rank`, `world_size` and `use_vissl` of AVION's class are read from the process group and not accepted.
    """

    def __init__(self, local_loss: bool = False, gather_with_grad: bool = True):
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad

    def forward(self, image_features, text_features, logit_scale) -> dict[str, torch.Tensor]:
        """image_features, text_features (B, E); logit_scale 0-d, already exponentiated.

        Returns `loss` (0-d float32; with `local_loss` this process's share) and `clip_acc`: the percentage
        of clips in its rows whose own text scores highest.
        """
        image_features, text_features = image_features.float(), text_features.float()
        mode = _backward_mode(self.local_loss, self.gather_with_grad)
        all_images = gather_features(image_features, mode)  # (W·B, E)
        all_texts = gather_features(text_features, mode)  # (W·B, E)
        first_row = world()[0] * image_features.shape[0] if self.local_loss else 0
        with torch.autocast(image_features.device.type, enabled=False):
            if self.local_loss:
                per_image = logit_scale * image_features @ all_texts.T  # (B, W·B)
                per_text = logit_scale * text_features @ all_images.T  # (B, W·B)
            else:
                per_image = logit_scale * all_images @ all_texts.T  # (W·B, W·B)
                per_text = per_image.T
            labels = torch.arange(per_image.shape[0], device=per_image.device) + first_row
            loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        accuracy = 100.0 * (per_image.detach().argmax(dim=-1) == labels).float().mean()
        return {"loss": loss, "clip_acc": accuracy}


class MaxMarginRankingLoss(nn.Module):
    """Bidirectional max-margin ranking loss of the global batch (Frozen in Time, arXiv 2104.00650).

    With S_ij the similarity of text i and clip j, n = W·B, and w_i the weight of pair i (1 without weights):

        loss = 1 / (2 n (n - 1)) · sum over i ≠ j of w_i · [relu(margin - S_ii + S_ij) + relu(margin - S_ii + S_ji)]

    so w_i scales all that pair i asks of the others, its text against their clips and its clip against their texts.
    The sum is divided by the number of terms, not by the weights: a batch of small weights gives a small loss.

    Args:
        margin: in units of the cosine.
        local_loss, gather_with_grad: as in `ClipLoss`; a process's own rows are its own pairs i.

    The diagonal is left out, which AVION's class calls `fix_norm`; that is not accepted, nor are `rank` and
    `world_size`, which are read from the process group.
    """

    def __init__(self, margin: float = 0.2, local_loss: bool = False, gather_with_grad: bool = True):
        super().__init__()
        self.margin = margin
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad

    def forward(self, image_features, text_features, weight=None) -> dict[str, torch.Tensor]:
        """image_features, text_features (B, E), normalised; weight (B,), not negative, or None.

        Returns `loss` (0-d float32; with `local_loss` this process's share) and `max_margin_loss`, the same
        without gradient.
        """
        images, texts = image_features.float(), text_features.float()  # (R, E), R rows: B or W·B
        mode = _backward_mode(self.local_loss, self.gather_with_grad)
        all_images = gather_features(images, mode)  # (W·B, E)
        all_texts = gather_features(texts, mode)  # (W·B, E)
        first_row = world()[0] * len(images) if self.local_loss else 0
        if not self.local_loss:
            images, texts = all_images, all_texts
            weight = None if weight is None else gather_features(weight.float()[:, None])[:, 0]
        with torch.autocast(images.device.type, enabled=False):
            per_text = texts @ all_images.T  # (R, W·B)
            per_image = images @ all_texts.T  # (R, W·B)
            own = per_text.diagonal(first_row)[:, None]  # (R, 1)
            pairs = F.relu(self.margin - own + per_text) + F.relu(self.margin - own + per_image)
            if weight is not None:
                pairs = pairs * weight.float()[:, None]
            rows, columns = pairs.shape
            column = torch.arange(columns, device=pairs.device)
            is_own = column[:rows, None] + first_row == column  # (R, W·B)
            loss = pairs.masked_fill(is_own, 0.0).sum() / (2 * rows * max(columns - 1, 1))
        return {"loss": loss, "max_margin_loss": loss.detach()}


def _backward_mode(local_loss: bool, gather_with_grad: bool) -> str:
    """How gradients come back through the gather; see `gather._AllGather`."""
    if gather_with_grad:
        return "sum"
    return "own" if local_loss else "copies"
