"""Interpolation from its definition, in numpy."""

import numpy as np


def linear_by_hand(embed: np.ndarray, frames: int) -> np.ndarray:
    """(T, D) → (frames, D): frame i covers the i-th of `frames` equal parts of the clip."""
    old = len(embed)
    rows = []
    for i in range(frames):
        at = min(max((i + 0.5) * old / frames - 0.5, 0), old - 1)
        low = int(np.floor(at))
        high = min(low + 1, old - 1)
        rows.append(embed[low] * (1 - (at - low)) + embed[high] * (at - low))
    return np.stack(rows)


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' convolution kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def bicubic_by_hand(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(h, w, D) → (rows, columns, D), borders repeated."""
    for axis, size in ((0, rows), (1, columns)):
        old = image.shape[axis]
        lines = []
        for i in range(size):
            at = (i + 0.5) * old / size - 0.5
            taps = range(int(np.floor(at)) - 1, int(np.floor(at)) + 3)
            line = sum(cubic(at - j) * image.take(min(max(j, 0), old - 1), axis=axis) for j in taps)
            lines.append(line)
        image = np.stack(lines, axis=axis)
    return image
