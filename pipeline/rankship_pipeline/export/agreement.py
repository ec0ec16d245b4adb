"""How closely two outputs agree: the measures of `Verified`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDED_TIE = 1 / 64  # in 8 bits: four steps of the outputs' grid
Outputs = NDArray[np.floating[Any]]  # (samples, …)


def find_error(got: Outputs, want: Outputs) -> float:
    """max|got - want| / max|want| over all samples."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def find_cosine(got: Outputs, want: Outputs) -> float:
    """The least cosine of a sample; 1 where both are zero."""
    a, b = (one.astype(np.float64).reshape(len(one), -1) for one in (got, want))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same_zero = (norms == 0) & (np.abs(a - b).max(axis=1) == 0)
    return float(np.where(same_zero, 1.0, (a * b).sum(1) / np.maximum(norms, 1e-300)).min())


def find_agreement(got: Outputs, want: Outputs, axis: int, tie: float) -> float:
    """The share of answers with the same class; a lead in `want` of at most `tie` of its largest score is a draw."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    chosen = a.argmax(axis)
    same = chosen == b.argmax(axis)
    if tie:
        taken = np.take_along_axis(b, np.expand_dims(chosen, axis), axis).squeeze(axis)
        same |= b.max(axis) - taken <= tie * np.abs(b).max()
    return float(same.mean())
