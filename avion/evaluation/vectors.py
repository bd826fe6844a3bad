"""Vectors of features."""

import numpy as np
from numpy.typing import ArrayLike, DTypeLike


def unit(x: ArrayLike, dtype: DTypeLike | None = np.float64) -> np.ndarray:
    """Bring the vectors in the last dimension to length 1; a vector of zeros stays as it is.

    Args:
        x: (…, E).
        dtype: What is computed in; None: the dtype of `x`.

    Returns:
        (…, E) in `dtype`.
    """
    x = np.asarray(x, dtype=dtype)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
