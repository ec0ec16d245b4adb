"""Merges by singular vectors of the models' changes; convolutions are matricised, other tensors are averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rankship_pipeline.merge.sparse import elect_and_average, trim
from rankship_pipeline.merge.tensors import MergeInput, sum_in_order

_TINY = 1e-10  # singular values below this share of the largest are rounding


def merge_tsv(given: MergeInput) -> Tensor:
    """TSV-M (Gargiulo et al. 2025): the leading r/T of every SVD(Δ_t) side by side, made orthogonal.

    Û = PQᵀ of the concatenated U's own SVD (the nearest orthonormal matrix), V̂ likewise; θ_0 + α·Û Σ V̂ᵀ. Biases,
    norms and embeddings are averaged.
    """
    changes = given.matrix_changes
    if not changes:
        return given.average()
    U, sigma, Vh = _concatenate(changes)
    return given.add_matrix(given.settings["scale"] * ((orthogonalise(U) * sigma) @ orthogonalise(Vh)))


def _concatenate(changes: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, T·r), σ (T·r,) and Vᵀ (T·r, columns) of every change's leading r = min(rows, columns) / T."""
    rank = max(1, min(changes[0].shape) // len(changes))
    parts = [torch.linalg.svd(change, full_matrices=False) for change in changes]
    return (
        torch.cat([U[:, :rank] for U, _, _ in parts], 1),
        torch.cat([sigma[:rank] for _, sigma, _ in parts]),
        torch.cat([Vh[:rank] for _, _, Vh in parts]),
    )


def orthogonalise(matrix: Tensor) -> Tensor:
    """PQᵀ of a matrix PDQᵀ: the nearest with orthonormal columns (or rows, where it is wide)."""
    P, _, Qh = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = P @ Qh
    return nearest


def merge_iso(given: MergeInput) -> Tensor:
    """Iso-C (Marczak et al. 2025): SVD(Σ_t Δ_t) = UΣVᵀ with every σ replaced by their mean.

    θ_0 + α·σ̄·UVᵀ. Biases, norms and embeddings are averaged.
    """
    changes = given.matrix_changes
    if not changes:
        return given.average()
    U, sigma, Vh = torch.linalg.svd(sum_in_order(changes), full_matrices=False)
    return given.add_matrix(given.settings["scale"] * sigma.mean() * (U @ Vh))


def merge_knots(given: MergeInput) -> Tensor:
    """KnOTS (Stoica et al. 2025): [Δ_1 … Δ_T] = UΣ[V_1ᵀ … V_Tᵀ], the V_tᵀ merged by TIES; θ_0 + λ·UΣVᵀ.

    Made for LoRA adapters, whose changes share few directions; holds for any change. Biases, norms and embeddings are
    averaged.
    """
    changes = given.matrix_changes
    if not changes:
        return given.average()
    U, sigma, Vh = torch.linalg.svd(torch.cat(changes, 1), full_matrices=False)
    kept = sigma > _TINY * sigma[0]
    aligned = [trim(part, given.settings) for part in Vh[kept].chunk(len(changes), 1)]
    return given.add_matrix(given.settings["scale"] * ((U[:, kept] * sigma[kept]) @ elect_and_average(aligned)))


def merge_ctm(given: MergeInput) -> Tensor:
    """Compress then merge (He et al. 2026, arXiv 2606.03723): merge r × r cores in one shared pair of subspaces.

    U spans the leading r left directions of [Δ_1 … Δ_T], V the leading r right ones of the Δ_t stacked; the cores
    UᵀΔ_tV are merged by TIES: θ_0 + λ·U C Vᵀ, of rank r by construction. `core_rank` = 0 takes the largest rank of
    any Δ_t, an adapter's own. The available text of the paper does not say how it finds the subspaces: this is our
    reading. Biases, norms and embeddings are averaged.
    """
    changes = given.matrix_changes
    if not changes:
        return given.average()
    rank = int(given.settings["core_rank"]) or max(count_rank(change, given.origin) for change in changes)
    U = torch.linalg.svd(torch.cat(changes, 1), full_matrices=False)[0][:, :rank]
    Vh = torch.linalg.svd(torch.cat(changes), full_matrices=False)[2][:rank]
    cores = [trim(U.T @ change @ Vh.T, given.settings) for change in changes]
    return given.add_matrix(given.settings["scale"] * (U @ elect_and_average(cores) @ Vh))


def count_rank(change: Tensor, base: Tensor) -> int:
    """A change's rank above the rounding of the float32 weights whose difference it is; at least 1."""
    norms = torch.linalg.vector_norm(base) + torch.linalg.vector_norm(change)  # no less than that of their sum
    rounding = torch.finfo(torch.float32).eps * float(norms)
    return max(1, int((torch.linalg.svdvals(change) > rounding).sum()))
