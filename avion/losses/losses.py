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
        if self.local_loss:
            mode = "sum" if self.gather_with_grad else "own"
        else:
            mode = "sum" if self.gather_with_grad else "copies"
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
    """Bidirectional max-margin ranking loss over S = T Vᵀ of the global batch (Frozen in Time, 2104.00650).

    The mean over all off-diagonal pairs (i, j), both directions together, of
    relu(margin - (S_ii - S_ij)) and relu(margin - (S_ii - S_ji)).
    """

    def __init__(self, margin: float = 0.2):
        super().__init__()
        self.margin = margin

    def forward(self, image_features, text_features, weight=None) -> dict[str, torch.Tensor]:
        """image_features, text_features (B, E), normalised; weight (B,), the importance of each pair's own
        clip, or None. Returns `loss` (0-d float32) and `max_margin_loss`, the same without gradient."""
        images = gather_features(image_features.float(), "sum")  # (W·B, E)
        texts = gather_features(text_features.float(), "sum")
        with torch.autocast(images.device.type, enabled=False):
            similarity = texts @ images.T  # (W·B, W·B)
            own = similarity.diagonal()[:, None]  # (W·B, 1)
            per_text = F.relu(self.margin - own + similarity)
            per_image = F.relu(self.margin - own + similarity.T)
            pairs = per_text + per_image
            if weight is not None:
                pairs = pairs * gather_features(weight.float()[:, None], "sum")
            off_diagonal = ~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)
            loss = pairs[off_diagonal].mean() / 2 if len(pairs) > 1 else pairs.sum() * 0.0
        return {"loss": loss, "max_margin_loss": loss.detach()}
