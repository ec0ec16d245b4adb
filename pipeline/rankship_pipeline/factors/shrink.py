"""Shrinks a Gram by as much as its own samples disagree, so that few calibration samples are not taken for all inputs.

A Gram of 12 samples holds 12 directions; whatever a layer does in the other hundred would look free. Two halves of the
samples tell how far such a matrix is from that of all inputs, without any assumption on how their rows depend on each
other (the patches of one image, the tokens of one text).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shrunk:
    """A second-moment matrix (n, n), positive definite, or (n,) where it is diagonal.

    `intensity` is the share, 0 to 1, that comes from the target and not from the samples.
    """

    matrix: Tensor
    intensity: float


def pool(halves: Tensor) -> Tensor:
    """The matrix of all samples (n, n) or (n,), from those of two halves of them (2, n, n) or (2, n)."""
    return halves.mean(0)


def shrink(halves: Tensor, samples: int) -> Shrunk:
    """The Gram (n, n) of `samples` samples, from those of their two halves (2, n, n), shrunk without regard to units.

    With D its diagonal and C = D^-½·G·D^-½, the result is D̂^½·((1 − λ)·C + λ·I)·D̂^½. λ = Σ Var(c_ij) / Σ c_ij² over
    i ≠ j is the intensity with the least expected squared error (Ledoit and Wolf 2004; for correlations Schäfer and
    Strimmer 2005); half the difference of the two halves has the variance of their mean. The logarithms of D move
    towards their mean alike, by their sampling variance over their whole variance and at least by λ: few samples say
    little of which input is large either. At λ = 1 the metric is the identity, and the SVD plain. A column that was zero
    in every sample counts as one of mean energy seen once in one more sample. A diagonal matrix (n,) only moves so.
    """
    gram = pool(halves)
    if gram.ndim == 1:
        return Shrunk(_shrink_energies(halves, samples, 0.0), 0.0)
    energies = gram.diagonal()
    inverse = torch.where(energies > 0, 1 / energies.clamp_min(0).sqrt(), 0)
    C, noise = (one * inverse[:, None] * inverse for one in (gram, (halves[0] - halves[1]) / 2))
    energy, variance = _add_off_diagonal(C), _add_off_diagonal(noise)
    intensity = min(1.0, variance / energy) if energy > 0 else 0.0
    shrunk = _shrink_energies(halves.diagonal(dim1=1, dim2=2), samples, intensity)
    root = shrunk.sqrt()
    matrix = (1 - intensity) * C * root[:, None] * root
    matrix.diagonal().copy_(shrunk)
    return Shrunk(matrix, intensity)


def _shrink_energies(halves: Tensor, samples: int, least: float) -> Tensor:
    """The mean squares of the columns (n,), their logarithms moved towards the mean; all 1 where all are zero."""
    energies = halves.mean(0)
    seen = energies > 0
    if not bool(seen.any()):
        return torch.ones_like(energies)
    logs = energies[seen].log()
    mean, spread = logs.mean(), float(logs.var(correction=0))
    once = energies[seen] / samples  # a half may never have seen a column, in samples / 2 draws
    apart = ((halves[0, seen] + once) / (halves[1, seen] + once)).log() / 2
    variance = float(apart.square().mean())
    share = max(least, min(1.0, variance / spread)) if spread > 0 else 0.0
    shrunk = torch.full_like(energies, float(mean.exp()) / (samples + 1))
    shrunk[seen] = (mean + (1 - share) * (logs - mean)).exp()
    return shrunk * (energies.mean() / shrunk.mean())


def _add_off_diagonal(matrix: Tensor) -> float:
    """Σ m_ij² over i ≠ j."""
    return float(matrix.square().sum() - matrix.diagonal().square().sum())
