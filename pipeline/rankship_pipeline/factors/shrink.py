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
    """A second-moment matrix (n, n), positive definite, or (n,) where it is diagonal, and what it was made from.

    `intensity` is the share, 0 to 1, of its off-diagonal elements that the samples do not bear out, `evened` that of
    the differences between its diagonal elements. `halves` are the matrices of two halves of the `samples`, (2, n, n)
    or (2, n).
    """

    matrix: Tensor
    intensity: float
    evened: float
    halves: Tensor
    samples: int

    def shrink_half(self, index: int) -> Tensor:
        """The matrix as one half of the samples alone would give it: its variance is twice that of the whole."""
        intensity, evened = (2 * share / (1 + share) for share in (self.intensity, self.evened))
        return _blend(self.halves[index], intensity, evened, self.samples // 2)


def pool(halves: Tensor) -> Tensor:
    """The matrix of all samples (n, n) or (n,), from those of two halves of them (2, n, n) or (2, n)."""
    return halves.mean(0)


def shrink(halves: Tensor, samples: int) -> Shrunk:
    """The Gram (n, n) of `samples` samples, from those of their two halves (2, n, n), shrunk without regard to units.

    With D its diagonal and C = D^-½·G·D^-½, the result is D̂^½·((1 − λ)·C + λ·I)·D̂^½. λ = Σ Var(c_ij) / Σ c_ij² over
    i ≠ j is the intensity with the least expected squared error (Ledoit and Wolf 2004; for correlations Schäfer and
    Strimmer 2005); half the difference of the two halves has the variance of their mean. The logarithms of D move
    towards their mean alike, by their sampling variance over their whole variance and at least by λ: few samples say
    little of which input is large either. At λ = 1 the metric is the identity, and the SVD plain. Of a diagonal matrix
    (n,) only the logarithms move.
    """
    gram = pool(halves)
    intensity = 0.0
    if gram.ndim == 2:  # noqa: PLR2004 - not a diagonal
        C, noise = (_scale(one, gram.diagonal()) for one in (gram, (halves[0] - halves[1]) / 2))
        energy, variance = _add_off_diagonal(C), _add_off_diagonal(noise)
        intensity = min(1.0, variance / energy) if energy > 0 else 0.0
    energies = halves if gram.ndim == 1 else halves.diagonal(dim1=1, dim2=2)
    evened = max(intensity, _find_evening(energies, samples))
    return Shrunk(_blend(gram, intensity, evened, samples), intensity, evened, halves, samples)


def _blend(gram: Tensor, intensity: float, evened: float, samples: int) -> Tensor:
    """The shrunk matrix, of the same mean energy.

    A column that was zero in all samples counts as one of mean energy that one sample more would have shown once.
    """
    energies = gram if gram.ndim == 1 else gram.diagonal()
    seen = energies > 0
    if not bool(seen.any()):
        return gram + (1 if gram.ndim == 1 else torch.eye(len(gram), dtype=gram.dtype))
    logs = energies[seen].log()
    even = torch.full_like(energies, float(logs.mean().exp()) / (samples + 1))
    even[seen] = (logs.mean() + (1 - evened) * (logs - logs.mean())).exp()
    even *= energies.mean() / even.mean()
    if gram.ndim == 1:
        return even
    root = even.sqrt()
    matrix = (1 - intensity) * _scale(gram, energies) * root[:, None] * root
    matrix.diagonal().copy_(even)
    return matrix


def _find_evening(halves: Tensor, samples: int) -> float:
    """The sampling variance of the columns' log energies (2, n) as a share, 0 to 1, of all their variance."""
    energies = halves.mean(0)
    seen = energies > 0
    spread = float(energies[seen].log().var(correction=0)) if bool(seen.any()) else 0.0
    once = energies[seen] / samples  # a half may never have seen a column, in samples / 2 draws
    apart = ((halves[0, seen] + once) / (halves[1, seen] + once)).log() / 2
    return min(1.0, float(apart.square().mean()) / spread) if spread > 0 else 0.0


def _scale(matrix: Tensor, energies: Tensor) -> Tensor:
    """D^-½·M·D^-½; 0 where an energy is."""
    inverse = torch.where(energies > 0, 1 / energies.clamp_min(0).sqrt(), 0)
    return matrix * inverse[:, None] * inverse


def _add_off_diagonal(matrix: Tensor) -> float:
    """Σ m_ij² over i ≠ j."""
    return float(matrix.square().sum() - matrix.diagonal().square().sum())
