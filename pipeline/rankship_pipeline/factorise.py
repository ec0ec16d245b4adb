"""One weight matrix into two factors: truncated SVD, plain or whitened by the inputs' Gram matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Eigenvalues below this share of the largest count as zero: rank-deficient Grams must work (METHODS §5).
EIGEN_FLOOR = 1e-10


@dataclass(frozen=True)
class Spectrum:
    """The whitened SVD of one weight, W·S = U·diag(σ)·Vᵀ, all float64.

    U (rows, r), sigma (r,) descending, right (r, columns) = Vᵀ·S⁺, so that U·diag(σ)·right = W on the inputs' span.
    """

    U: Tensor
    sigma: Tensor
    right: Tensor

    @property
    def energy(self) -> Tensor:
        """σ²: the output energy of each rank component, descending."""
        return self.sigma**2


def decompose_plain(weight: Tensor, _gram: Tensor | None) -> Spectrum:
    """SVD of the weight itself."""
    U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
    return Spectrum(U=U, sigma=sigma, right=Vh)


def decompose_eigen(weight: Tensor, gram: Tensor | None) -> Spectrum:
    """SVD of W·G^½ by eigen-decomposition; the truncation loss ‖(W − W_k)Xᵀ‖² is then Σ_{j>k} σ_j² exactly.

    Works on rank-deficient Gram matrices, where Cholesky fails: the null space is dropped and pseudo-inverted.
    """
    if gram is None:
        return decompose_plain(weight, None)
    values, Q = torch.linalg.eigh(gram)
    kept = values > EIGEN_FLOOR * values.max()
    if not bool(kept.any()):
        return decompose_plain(weight, None)  # the layer saw only zeros: no direction matters more than another
    root = values[kept].sqrt()
    Q = Q[:, kept]
    U, sigma, Vh = torch.linalg.svd(weight @ (Q * root), full_matrices=False)
    return Spectrum(U=U, sigma=sigma, right=(Vh / root) @ Q.T)


WHITENINGS: dict[str, Callable[[Tensor, Tensor | None], Spectrum]] = {
    "plain": decompose_plain,
    "eigen": decompose_eigen,
}


def truncate(spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A (rows, rank) and B (rank, columns), A·B the best approximation, each component's norms balanced.

    Equal norms per component keep the factors well scaled for float32 and for later refinement (METHODS §1). A rank
    beyond the spectrum is filled with zeros, so shapes always are what the plan says.
    """
    rows, available = spectrum.U.shape
    columns = spectrum.right.shape[1]
    used = min(rank, available)
    A = torch.zeros(rows, rank, dtype=torch.float64)
    B = torch.zeros(rank, columns, dtype=torch.float64)
    left = spectrum.U[:, :used] * spectrum.sigma[:used]
    right = spectrum.right[:used]
    left_norm, right_norm = left.norm(dim=0), right.norm(dim=1)
    alive = (left_norm > 0) & (right_norm > 0)
    scale = torch.where(alive, (right_norm / left_norm.clamp_min(1e-300)).sqrt(), torch.ones_like(left_norm))
    A[:, :used] = left * scale
    B[:used] = right / scale[:, None]
    return A, B
