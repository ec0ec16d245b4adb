"""Shrinks a Gram by as much as its own samples disagree, so that few calibration samples are not taken for all inputs.

A Gram of 12 samples holds 12 directions; whatever a layer does in the other hundred would look free. Two halves of the
samples tell how far such a matrix is from that of all inputs, without any assumption on how their rows depend on each
other (the patches of one image, the tokens of one text).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rankship_pipeline.factors.eigen import find_damped_cholesky, find_eigen

# Of half the samples, among which the likeliest is taken.
_INTENSITIES = torch.logspace(-6, 0, 61, dtype=torch.float64)
_NEXT_TO_NOTHING = 0.01
# Added to W·D̂·Wᵀ as a share of its diagonal: a layer's outputs may depend on each other.
_DAMPING = 1e-10
# Columns up to which likelihoods are exact; beyond, two eigen-decompositions take long.
_EXACT = 1024
# Random vectors, and steps from each, of which likelihoods of more columns are estimated.
_PROBES = 16
_STEPS = 64


@dataclass(frozen=True)
class Doubt:
    """How much of a matrix the samples do not bear out, 0 to 1.

    `intensity` is that share of its off-diagonal elements, `evened` that of the differences between its diagonal ones.
    """

    intensity: float
    evened: float


@dataclass(frozen=True)
class Shrunk:
    """A second-moment matrix (n, n), positive definite, or (n,) where it is diagonal, and what it was made from.

    `halves` are the matrices of two halves of the `samples`, (2, n, n) or (2, n).
    """

    matrix: Tensor
    doubt: Doubt
    halves: Tensor
    samples: int

    @property
    def intensity(self) -> float:
        """The share of the off-diagonal elements that the samples do not bear out."""
        return self.doubt.intensity

    def shrink_half(self, index: int) -> Tensor:
        """The matrix as one half of the samples alone would give it: its variance is twice that of the whole."""
        intensity, evened = (2 * share / (1 + share) for share in (self.doubt.intensity, self.doubt.evened))
        return _blend(self.halves[index].double(), Doubt(intensity, evened), self.samples // 2)


def pool(halves: Tensor) -> Tensor:
    """The matrix of all samples (n, n) or (n,), from those of two halves of them (2, n, n) or (2, n)."""
    return halves.double().mean(0)


def shrink(halves: Tensor, samples: int, doubt: Doubt | None = None) -> Shrunk:
    """The Gram (n, n) of `samples` samples, from those of their two halves (2, n, n), shrunk without regard to units.

    A `doubt` that was found before need not be found again.

    With D its diagonal and C = D^-½·G·D^-½, the result is D̂^½·((1 − λ)·C + λ·I)·D̂^½. λ is the intensity under which
    either half, shrunk, makes the other most likely as that of Gaussian inputs; the variance rule of
    `shrink_curvature` is for the largest elements, and drowns the small directions that decide what a rank loses. Where
    that rule finds next to nothing to shrink, its λ is taken, which saves two eigen-decompositions. The logarithms of
    D move towards their mean, by their sampling variance over their whole variance: few samples say little of which
    input is large either. At λ = 1 and equal D the metric is the identity, and the SVD plain. Of a diagonal matrix (n,)
    only the logarithms move.
    """
    gram = pool(halves)
    if doubt is None:
        flat, energies = gram.ndim == 1, halves if gram.ndim == 1 else halves.diagonal(dim1=1, dim2=2)
        intensity = 0.0 if flat else _find_intensity(*(_scale(half.double(), gram.diagonal()) for half in halves))
        doubt = Doubt(intensity, _find_evening(energies, samples))
    return Shrunk(_blend(gram, doubt, samples), doubt, halves, samples)


def doubt_curvature(halves: Tensor, samples: int) -> Doubt:
    """How much of a curvature is shrunk, from its halves: λ = Σ Var(c_ij) / Σ c_ij² over i ≠ j, and D at least by λ.

    That λ has the least expected squared error (Ledoit and Wolf 2004; for correlations Schäfer and Strimmer 2005). A
    few samples near a decision make up most of a curvature, so that no likelihood fits it; the variance sees that the
    halves disagree.
    """
    intensity = _weigh_variance(halves)
    return Doubt(intensity, max(intensity, _find_evening(halves.diagonal(dim1=1, dim2=2), samples)))


def shrink_curvature(halves: Tensor, samples: int, doubt: Doubt | None = None) -> Tensor:
    """A curvature (n, n) shrunk like a Gram, by `doubt_curvature` unless that was found before."""
    return _blend(pool(halves), doubt or doubt_curvature(halves, samples), samples)


def shrink_outputs(weight: Tensor, outputs: Tensor, energies: Tensor, samples: int) -> tuple[Tensor, float]:
    """The Gram of a layer's outputs W·G·Wᵀ (rows, rows), shrunk in the space of its inputs, and the intensity λ.

    `outputs` (2, rows, rows) and the inputs' `energies` D (2, columns) are those of two halves of the samples. With Ĝ =
    (1 − λ)·G + λ·D̂ and D̂ evened as by `shrink` the result is W·Ĝ·Wᵀ, so that nothing of the size (columns, columns) is
    needed. λ is found as there, where inputs without correlations, W·D̂·Wᵀ, take the place of the identity.
    """
    energy, seen = energies.mean(0), energies.mean(0) > 0
    even = _blend(energy, Doubt(0.0, _find_evening(energies, samples)), samples)
    apart = (weight * even) @ weight.T
    L = find_damped_cholesky(apart, _DAMPING)
    intensity = _find_intensity(*(whiten(half, L) for half in outputs))
    matrix = (1 - intensity) * pool(outputs) + (weight * torch.where(seen, intensity * even, even)) @ weight.T
    return matrix, intensity


def _find_intensity(first: Tensor, second: Tensor) -> float:
    """λ from two halves' matrices in the units in which λ = 1 is the identity."""
    intensity = _compare(first, second)
    return intensity if intensity <= _NEXT_TO_NOTHING else _find_likeliest(first, second)


def _weigh_variance(halves: Tensor) -> float:
    """The variance rule's λ, whatever the matrices' units."""
    energies = halves.diagonal(dim1=1, dim2=2).double().mean(0)
    return _compare(*(_scale(half.double(), energies) for half in halves))


def _compare(first: Tensor, second: Tensor) -> float:
    """Σ Var(c_ij) / Σ c_ij² over i ≠ j, 0 to 1: half the difference of two halves has the variance of their mean."""
    energy = _add_off_diagonal((first + second) / 2)
    return min(1.0, _add_off_diagonal((first - second) / 2) / energy) if energy > 0 else 0.0


def _find_likeliest(first: Tensor, second: Tensor) -> float:
    """The intensity for all samples from that for half of them, the likeliest of _INTENSITIES on the other half."""
    if not (bool(first.any()) and bool(second.any())):
        return 1.0
    weigh = _weigh_exactly if len(first) <= _EXACT else _weigh_by_probes
    half = float(_INTENSITIES[int((weigh(first, second) + weigh(second, first)).argmin())])
    return half / (2 - half)


def _weigh_exactly(made: Tensor, unseen: Tensor) -> Tensor:
    """For every λ of _INTENSITIES log det S + tr(S⁻¹·`unseen`), where S = (1 − λ)·`made` + λ·I."""
    values, Q = find_eigen(made)
    energies = (Q * (unseen @ Q)).sum(0)  # of the unseen half along each eigenvector
    shrunk = _shrink_values(values)
    return (shrunk.log() + energies / shrunk).sum(1)


def _weigh_by_probes(made: Tensor, unseen: Tensor) -> Tensor:
    """What `_weigh_exactly` gives, estimated from random vectors of ±1 (Ubaru, Chen and Saad 2017) in O(n²).

    Lanczos steps from a vector v give a small matrix whose functions stand for those of `made`, so v·f(made)·v for
    every λ at once. All λ see the same vectors, so that chance hardly moves the least.
    """
    size = len(made)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 2, (_PROBES, size), generator=generator).to(made.dtype) * 2 - 1
    basis = torch.zeros(_PROBES, _STEPS, size, dtype=made.dtype)  # orthonormal for each probe
    step = draws / size**0.5
    diagonal, beside = [], []
    for taken in range(_STEPS):
        basis[:, taken] = step
        moved = step @ made
        diagonal.append((moved * step).sum(1))
        seen = basis[:, : taken + 1]
        for _ in range(2):  # rounding leaves a rest after one
            moved -= ((seen @ moved[:, :, None]).transpose(1, 2) @ seen)[:, 0]
        beside.append(moved.norm(dim=1))
        step = moved / beside[-1].clamp_min(torch.finfo(made.dtype).tiny)[:, None]
    off = torch.stack(beside[:-1], 1)
    values, Q = torch.linalg.eigh(
        torch.diag_embed(torch.stack(diagonal, 1)) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    )  # (probes, steps), (probes, steps, steps)
    found = basis @ (basis[:, 0] @ unseen)[:, :, None]  # (probes, steps, 1): of the unseen half along each step
    along = (found.transpose(1, 2) @ Q)[:, 0]
    shrunk = _shrink_values(values.flatten()).reshape(-1, *values.shape)
    logs, energies = shrunk.log() * Q[:, 0] ** 2, Q[:, 0] * along / shrunk
    costs: Tensor = (logs + energies).sum((1, 2)) * (size / _PROBES)
    return costs


def _shrink_values(values: Tensor) -> Tensor:
    """The eigenvalues (n,) of a shrunk matrix for every intensity: (intensities, n)."""
    return (1 - _INTENSITIES)[:, None] * values.clamp_min(0) + _INTENSITIES[:, None]


def _blend(gram: Tensor, doubt: Doubt, samples: int) -> Tensor:
    """The shrunk matrix, of the same mean energy.

    A column that was zero in all samples counts as one of mean energy that one sample more would have shown once.
    """
    energies = gram if gram.ndim == 1 else gram.diagonal()
    seen = energies > 0
    if not bool(seen.any()):
        return gram + (1 if gram.ndim == 1 else torch.eye(len(gram), dtype=gram.dtype))
    logs = energies[seen].log()
    even = torch.full_like(energies, float(logs.mean().exp()) / (samples + 1))
    even[seen] = (logs.mean() + (1 - doubt.evened) * (logs - logs.mean())).exp()
    even *= energies.mean() / even.mean()
    if gram.ndim == 1:
        return even
    root = even.sqrt()
    matrix = (1 - doubt.intensity) * _scale(gram, energies) * root[:, None] * root
    matrix.diagonal().copy_(even)
    return matrix


def _find_evening(halves: Tensor, samples: int) -> float:
    """The sampling variance of the columns' log energies (2, n) as a share, 0 to 1, of all their variance."""
    halves = halves.double()
    energies = halves.mean(0)
    seen = energies > 0
    spread = float(energies[seen].log().var(correction=0)) if bool(seen.any()) else 0.0
    once = energies[seen] / samples  # a half may never have seen a column, in samples / 2 draws
    apart = ((halves[0, seen] + once) / (halves[1, seen] + once)).log() / 2
    return min(1.0, float(apart.square().mean()) / spread) if spread > 0 else 0.0


def whiten(matrix: Tensor, L: Tensor) -> Tensor:
    """L⁻¹·M·L⁻ᵀ of a symmetric matrix, L lower triangular."""
    half = torch.linalg.solve_triangular(L, matrix, upper=False)
    whitened: Tensor = torch.linalg.solve_triangular(L, half.T, upper=False)
    return whitened


def _scale(matrix: Tensor, energies: Tensor) -> Tensor:
    """D^-½·M·D^-½; 0 where an energy is."""
    inverse = torch.where(energies > 0, 1 / energies.clamp_min(0).sqrt(), 0)
    return matrix * inverse[:, None] * inverse


def _add_off_diagonal(matrix: Tensor) -> float:
    """Σ m_ij² over i ≠ j."""
    return float(matrix.square().sum() - matrix.diagonal().square().sum())
