"""Factors one weight matrix into two by a truncated SVD, whitened by the layer's inputs and its output's effect."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from rankship_pipeline.factors.eigen import (
    find_cholesky,
    find_damped_cholesky,
    find_eigen,
    find_eigenvalues,
    find_root,
    find_singular,
)
from rankship_pipeline.factors.shrink import Doubt, Shrunk, doubt_curvature, pool, shrink, shrink_curvature, whiten

# Eigenvalues of a Gram with columns of equal energy below this share of the largest count as zero.
EIGEN_FLOOR = 1e-10
# Added to W·Wᵀ as a share of its diagonal: outputs may depend on each other.
_REDUCING = 1e-6
# Rows and columns up to which the exact way takes no time.
_SMALL = 640
# Added to a curvature as a share of its own diagonal: directions that no calibration sample affects still count.
CURVATURE_RIDGE = 1e-2


@dataclass(frozen=True)
class Doubts:
    """How much of a layer's Gram and of its curvature the samples do not bear out; takes long to find."""

    gram: Doubt
    curvature: Doubt | None


@dataclass(frozen=True)
class Metric:
    """The size of an error in a weight (rows, columns): ‖R ΔW S‖² with S·Sᵀ = `gram` and Rᵀ·R = `curvature`.

    `gram` is that of the inputs, (columns, columns), or (columns,) where it is diagonal; `curvature` that of the loss
    at the outputs, (rows, rows); None stands for the identity. `evidence` has the halves of samples that the Gram was
    shrunk by, for errors on unseen samples. With `inner`, L, square and of the smaller side, the layer is seen as L·Q
    on inputs reduced to Q·x, or as L whose outputs Q makes the layer's (see `reduce_side`): the Gram or the curvature
    is that of L. `doubts` are None where nothing was shrunk.
    """

    gram: Tensor | None = None
    curvature: Tensor | None = None
    evidence: Shrunk | None = field(default=None, compare=False)
    doubts: Doubts | None = field(default=None, compare=False)
    inner: Tensor | None = field(default=None, compare=False)

    def list_held(self) -> list[Tensor]:
        """Its matrices, and what was computed from them so far."""
        halves = None if self.evidence is None else self.evidence.halves
        return [
            one for one in (self.gram, self.curvature, self.inner, halves, vars(self).get("root")) if one is not None
        ]

    @cached_property
    def root(self) -> Tensor | None:
        """Rᵀ of the damped curvature, (rows, rows), lower triangular, found once; None without a curvature."""
        return None if self.curvature is None else find_damped_cholesky(damp(self.curvature), EIGEN_FLOOR)


def make_metric(
    gram: Tensor,
    curvature: Tensor | None,
    samples: int,
    *,
    units: Tensor | None = None,
    shrunk: bool = True,
    doubts: Doubts | None = None,
) -> Metric:
    """The metric from a Gram's and a curvature's halves, (2, n, n) or (2, n); unshrunk, their means.

    `units` (rows,) are what one of each output is small or large against, where outputs have units of their own: the
    curvature is shrunk where all of them are one. `doubts` are those of the same metric, if it was made before.
    """
    if not shrunk:
        return Metric(gram=pool(gram), curvature=None if curvature is None else pool(curvature))
    evidence = shrink(gram, samples, None if doubts is None else doubts.gram)
    if curvature is None:
        return Metric(gram=evidence.matrix, evidence=evidence, doubts=Doubts(evidence.doubt, None))
    scale = torch.ones(curvature.shape[1], dtype=curvature.dtype) if units is None else units
    scaled = curvature * scale[:, None] * scale
    doubt = (None if doubts is None else doubts.curvature) or doubt_curvature(scaled, samples)
    weighed = shrink_curvature(scaled, samples, doubt) / scale[:, None] / scale
    return Metric(gram=evidence.matrix, curvature=weighed, evidence=evidence, doubts=Doubts(evidence.doubt, doubt))


def fit_metric(
    weight: Tensor,
    gram: Tensor,
    curvature: Tensor | None,
    samples: int,
    *,
    units: Tensor | None = None,
    shrunk: bool = True,
    doubts: Doubts | None = None,
) -> Metric:
    """The metric of a weight (rows, columns), from halves of which one may be of its smaller side instead.

    A Gram (2, rows, rows) is that of the outputs, W·G·Wᵀ; a curvature (2, columns, columns) that at the inputs, Wᵀ·H·W,
    which has the inputs' units: `units` are for one at the outputs. The rest is as in `make_metric`.
    """
    rows, columns = weight.shape
    inner = None
    if gram.shape[-1] != columns:
        inner, gram = reduce_side(weight, gram)
    if curvature is not None and curvature.shape[-1] != rows:
        inner, curvature = reduce_side(weight, curvature)
        units = None
    made = make_metric(gram, curvature, samples, units=units, shrunk=shrunk, doubts=doubts)
    return replace(made, inner=inner)


def reduce_side(weight: Tensor, halves: Tensor) -> tuple[Tensor, Tensor]:
    """L, square and of a weight's smaller side, and the halves of the matrix in L's metric that stands for the larger.

    Wide: W = L·Q, L lower triangular, Q (rows, columns) of orthonormal rows. All that a layer sees of its inputs x is
    Q·x, so that their Gram is all that counts, from that of W·x: Q·G·Qᵀ = L⁻¹·(W·G·Wᵀ)·L⁻ᵀ. Tall: W = Q·L, L upper
    triangular, Q of orthonormal columns. The best factors of every rank, W·V·Vᵀ with V on the inputs, stay in the span
    of W's columns, so that all that counts of a curvature is Qᵀ·H·Q = L⁻ᵀ·(Wᵀ·H·W)·L⁻¹. `halves` (2, n, n) are W·G·Wᵀ
    or Wᵀ·H·W. Q is not made, nor anything of the larger side's size.
    """
    wide = weight.shape[0] < weight.shape[1]
    narrow = weight.float() if wide else weight.float().T
    L = find_damped_cholesky((narrow @ narrow.T).double(), _REDUCING)
    return L if wide else L.T, torch.stack([whiten(one.double(), L) for one in halves])


def join_metrics(embedding: Metric, heads: Sequence[Metric]) -> Metric:
    """The one metric of an embedding and the heads that have its table as weight: both uses' errors added up.

    Of an error Δ in the row of token v, with f_v its frequency in one sample and H the curvature at the embedding's
    output, the embedding's part is f_v·Δ·H·Δᵀ. At a head the Kronecker-factored Fisher is that of softmax's logits,
    diag(p) − p·pᵀ, times the inputs' Gram G (Martens and Grosse 2015); only its diagonal is kept, as a matrix of
    V × V has no place in memory, and p_v is taken from the frequencies, f_v / Σf: its part is f_v·Δ·(G / Σf)·Δᵀ. So
    the sum has Kronecker weights again, diag(f) ⊗ (H + G / Σf), under which the SVD is the optimum. Without a
    curvature the two are in different units, and the identity and G of mean eigenvalue one count the same.
    """
    grams = [head.gram for head in heads if head.gram is not None and bool(head.gram.any())]
    if not grams or embedding.gram is None:
        return embedding
    H = embedding.curvature
    if H is None:
        H = torch.eye(len(grams[0]), dtype=torch.float64)
        shares = [gram / gram.diagonal().mean() for gram in grams]
    else:
        shares = [gram / embedding.gram.sum() for gram in grams]
    return replace(embedding, curvature=torch.stack([H, *shares]).sum(0))


@dataclass(frozen=True)
class Spectrum:
    """The whitened SVD of one weight, R·W·S = U'·diag(σ)·Vᵀ, all float64.

    U (rows, r) = R⁺·U', sigma (r,) descending, right (r, columns) = Vᵀ·S⁺, so that U·diag(σ)·right = W on the
    inputs' span.
    """

    U: Tensor
    sigma: Tensor
    right: Tensor

    @property
    def energy(self) -> Tensor:
        """σ²: the output energy of each rank component, descending."""
        return self.sigma**2


def decompose(weight: Tensor, metric: Metric, whitening: str) -> Spectrum:
    """The best factors of every rank under the metric; `whitening` is a key of WHITENINGS.

    Small weights go by "eigen" instead of "swift": it loses nothing, and takes no time there.

    With a curvature the truncation loss tr(Δ·G·Δᵀ·H), again Σ_{j>k} σ_j² exactly, is the second-order change of the
    model's own output distribution (Kronecker-factored Fisher, Martens and Grosse 2015; for convolutions Grosse and
    Martens 2016). Rank then goes to outputs that change predictions, not only to large outputs.
    """
    if whitening == "swift" and max(weight.shape) <= _SMALL:
        whitening = "eigen"
    if metric.root is None:
        return WHITENINGS[whitening](weight, metric.gram)
    spectrum = WHITENINGS[whitening](metric.root.T @ weight, metric.gram)
    U = torch.linalg.solve_triangular(metric.root.T, spectrum.U, upper=True)
    return Spectrum(U=U, sigma=spectrum.sigma, right=spectrum.right)


def damp(curvature: Tensor) -> Tensor:
    """The curvature with CURVATURE_RIDGE of its diagonal added, in any units; the identity if it is zero.

    An output without effect on the predictions counts as CURVATURE_RIDGE of one of mean effect.
    """
    diagonal = curvature.diagonal()
    affects = diagonal > 0
    if not bool(affects.any()):
        return torch.eye(len(curvature), dtype=curvature.dtype)
    return curvature + CURVATURE_RIDGE * torch.where(affects, diagonal, diagonal[affects].log().mean().exp()).diag()


def decompose_plain(weight: Tensor, _gram: Tensor | None) -> Spectrum:
    """SVD of the weight itself."""
    U, sigma, Vh = find_singular(weight)
    return Spectrum(U=U, sigma=sigma, right=Vh)


def decompose_eigen(weight: Tensor, gram: Tensor | None) -> Spectrum:
    """SVD of W·G^½ by eigen-decomposition; the truncation loss ‖(W − W_k)Xᵀ‖² is then Σ_{j>k} σ_j² exactly.

    Works on rank-deficient Gram matrices, where Cholesky fails: the null space is dropped and pseudo-inverted.
    """
    if gram is None:
        return decompose_plain(weight, None)
    S, inverse = find_root(gram, EIGEN_FLOOR)
    if gram.ndim == 1:
        U, sigma, Vh = find_singular(weight * S)
        return Spectrum(U=U, sigma=sigma, right=Vh * inverse)
    U, sigma, Vh = find_singular(weight @ S)
    return Spectrum(U=U, sigma=sigma, right=Vh @ inverse.T)


def decompose_cholesky(weight: Tensor, gram: Tensor | None) -> Spectrum:
    """SVD of W·L with G = L·Lᵀ (SVD-LLM, ARA §3): the same optimum as by eigen-decomposition, at less cost.

    A rank-deficient Gram has no Cholesky factor (the most frequent complaint of SVD-LLM's users): such layers fall back
    to `decompose_eigen`.
    """
    if gram is None or gram.ndim == 1:
        return decompose_eigen(weight, gram)
    L = find_cholesky(gram, EIGEN_FLOOR)
    if L is None:
        return decompose_eigen(weight, gram)
    U, sigma, Vh = find_singular(weight @ L)
    return Spectrum(U=U, sigma=sigma, right=torch.linalg.solve_triangular(L, Vh, upper=False, left=False))


def decompose_swift(weight: Tensor, gram: Tensor | None, keep: int | None = None) -> Spectrum:
    """Swift-SVD: one symmetric eigen-decomposition on the smaller side of W·S, S·Sᵀ = G, and no inverse.

    Wide: eigenvectors U of W·G·Wᵀ. Tall: eigenvectors V of SᵀWᵀWS, then U = W·S·V, normalised. Either way right =
    diag(1/σ)·Uᵀ·W. Both square the condition number: energies are right to about 1e-16 of the largest (float32: 1e-7),
    and components below that, times the size, are dropped. With `keep`, U and right stop there; sigma does not.
    """
    gram = torch.ones(weight.shape[1], dtype=weight.dtype) if gram is None or not bool(gram.any()) else gram
    if weight.shape[0] <= weight.shape[1]:
        return decompose_outputs(weight, (weight * gram if gram.ndim == 1 else weight @ gram) @ weight.T, keep)
    if gram.ndim == 1:
        P = weight * gram.clamp_min(0).sqrt()
    else:
        S = find_cholesky(gram.double(), EIGEN_FLOOR)
        P = weight @ (find_root(gram.double(), EIGEN_FLOOR)[0] if S is None else S).to(weight.dtype)
    energy, V = _sort_eigen(P.T @ P, keep)
    U = P @ V
    return _finish(weight, energy, U / U.norm(dim=0).clamp_min(torch.finfo(U.dtype).tiny))


def decompose_outputs(weight: Tensor, outputs: Tensor, keep: int | None = None) -> Spectrum:
    """Swift-SVD from the Gram of a layer's outputs without bias, W·G·Wᵀ (rows, rows), without the inputs' Gram."""
    return _finish(weight, *_sort_eigen(outputs, keep))


def _sort_eigen(matrix: Tensor, keep: int | None) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a symmetric positive matrix, descending, and the first `keep` eigenvectors."""
    values, Q = find_eigen(matrix)
    return values.flip(0).clamp_min(0), Q[:, -min(keep or len(Q), len(Q)) :].flip(1)


def _finish(weight: Tensor, energy: Tensor, U: Tensor) -> Spectrum:
    floor = torch.finfo(energy.dtype).eps * len(energy) * energy[0]
    sigma = torch.where(energy > floor, energy, 0).sqrt()
    kept = sigma[: U.shape[1]]
    U = U * (kept > 0)
    return Spectrum(U=U, sigma=sigma, right=(U.T @ weight) / torch.where(kept > 0, kept, 1)[:, None])


WHITENINGS: dict[str, Callable[[Tensor, Tensor | None], Spectrum]] = {
    "plain": decompose_plain,
    "cholesky": decompose_cholesky,
    "eigen": decompose_eigen,
    "swift": decompose_swift,
}


def measure_plain(weight: Tensor) -> Tensor:
    """σ² of a weight (rows, columns) itself, descending, from its smaller side."""
    squares = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    return find_eigenvalues(squares).flip(0).clamp_min(0)


def truncate(spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A (rows, rank) and B (rank, columns), A·B the best approximation, each component's norms balanced.

    A rank beyond the spectrum is filled with zeros, so that the shapes always match the plan.
    """
    rows, available = spectrum.U.shape
    columns = spectrum.right.shape[1]
    used = min(rank, available)
    A = torch.zeros(rows, rank, dtype=torch.float64)
    B = torch.zeros(rank, columns, dtype=torch.float64)
    A[:, :used] = spectrum.U[:, :used] * spectrum.sigma[:used]
    B[:used] = spectrum.right[:used]
    return balance(A, B)


def balance(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Scale A's columns and B's rows to equal norms in every component; the product A·B does not change.

    Keeps the factors well scaled for float32 and for refinement (unbalanced ones fell to 15–40 % accuracy in it).
    """
    left, right = A.norm(dim=0), B.norm(dim=1)
    alive = (left > 0) & (right > 0)
    scale = torch.where(alive, (right / left.clamp_min(1e-300)).sqrt(), torch.ones_like(left))
    return A * scale, B / scale[:, None]
