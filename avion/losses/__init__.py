"""Losses over the global batch."""

from .losses import ClipLoss, MaxMarginRankingLoss

__all__ = ["ClipLoss", "MaxMarginRankingLoss"]
