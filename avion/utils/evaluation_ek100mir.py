"""AVION's import path; the functions are defined in `avion.evaluation.ek100_mir`."""

from avion.evaluation.ek100_mir import get_mAP, get_nDCG

__all__ = ["get_mAP", "get_nDCG"]
