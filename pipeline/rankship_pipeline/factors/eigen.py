"""Eigenvalues and singular values of any finite matrix: the one place that asks LAPACK, with a way on where it fails.

LAPACK's divide-and-conquer routines, torch's defaults, are the fastest, and now and then do not converge on a finite
matrix (a Gram with a thousand zero rows, say). QR iteration does, more slowly.
"""

import scipy.linalg
import torch
from torch import Tensor

from rankship_pipeline.foundation.errors import BuildError


def find_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), ascending, and eigenvectors (n, n), one a column, of a symmetric matrix (n, n)."""
    _refuse_infinite(matrix)
    try:
        values, Q = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is
        values, Q = map(torch.from_numpy, scipy.linalg.eigh(matrix.numpy(), driver="ev"))
    return values, Q


def find_eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues (n,), ascending, of a symmetric matrix (n, n)."""
    _refuse_infinite(matrix)
    try:
        values: Tensor = torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is
        return find_eigen(matrix)[0]
    return values


def find_singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a matrix (m, n): U (m, r), σ (r,) descending, Vᵀ (r, n), with r = min(m, n)."""
    _refuse_infinite(matrix)
    try:
        U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is
        found = scipy.linalg.svd(matrix.numpy(), full_matrices=False, lapack_driver="gesvd")
        U, sigma, Vh = map(torch.from_numpy, found)
    return U, sigma, Vh


def find_root(gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """S (n, r) with S·Sᵀ = gram, and S⁺ᵀ (n, r), by eigenvalues; those below `floor` of the largest are dropped.

    The columns are first scaled to equal energy, so that what is dropped does not depend on the inputs' units: an
    amount in cents beside flags of 0 and 1 is no reason to drop the flags. A diagonal Gram (n,) gives diagonal roots
    (n,); an all-zero Gram gives the identity: all directions count the same.
    """
    if gram.ndim == 1:
        root = gram.clamp_min(0).sqrt() if bool((gram > 0).any()) else torch.ones_like(gram)
        return root, torch.where(root > 0, 1 / root.clamp_min(torch.finfo(root.dtype).tiny), 0)
    scale = gram.diagonal().clamp_min(0).sqrt()
    if not bool(scale.any()):
        eye = torch.eye(len(gram), dtype=gram.dtype)
        return eye, eye
    inverse = torch.where(scale > 0, 1 / scale, 0)
    values, Q = find_eigen(gram * inverse[:, None] * inverse)
    kept = values > floor * values.max()
    root = values[kept].sqrt()
    return scale[:, None] * Q[:, kept] * root, inverse[:, None] * Q[:, kept] / root


def find_cholesky(gram: Tensor, floor: float) -> Tensor | None:
    """L, lower triangular, with L·Lᵀ = gram; None where its columns, scaled to equal energy, are not independent."""
    scale = gram.diagonal().clamp_min(0).sqrt()
    if not bool((scale > 0).all()):
        return None
    L, failed = torch.linalg.cholesky_ex(gram / scale[:, None] / scale)
    if int(failed) or float(L.diagonal().min()) ** 2 <= floor:
        return None
    root: Tensor = scale[:, None] * L
    return root


def find_damped_cholesky(gram: Tensor, damping: float) -> Tensor:
    """L, lower triangular, with L·Lᵀ = gram + damping · its diagonal, of any positive semi-definite matrix.

    The damping is raised where rounding has made the matrix indefinite by more than that.
    """
    _refuse_infinite(gram)
    diagonal = gram.diagonal().clamp_min(0)
    scale = torch.where(diagonal > 0, diagonal.sqrt(), 1.0)
    scaled, eye = gram / scale[:, None] / scale, torch.eye(len(gram), dtype=gram.dtype)
    L, failed = torch.linalg.cholesky_ex(scaled + damping * eye)
    while int(failed):
        damping *= 10
        L, failed = torch.linalg.cholesky_ex(scaled + damping * eye)
    root: Tensor = scale[:, None] * L
    return root


def _refuse_infinite(matrix: Tensor) -> None:
    if not bool(matrix.isfinite().all()):
        raise BuildError(
            f"a matrix of {tuple(matrix.shape)} to decompose holds numbers that are not finite",
            hint="a weight or an activation on the calibration data is infinite or NaN: check the model on that data",
        )
