"""AVION's import path; the functions are defined in `avion.evaluation.ek100_cls`."""

from avion.evaluation.ek100_cls import get_marginal_indexes, get_mean_accuracy, marginalize

__all__ = ["get_marginal_indexes", "get_mean_accuracy", "marginalize"]
