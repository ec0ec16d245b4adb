"""Merges in closed form, weighted by Gram matrices of each layer's inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rankship_pipeline.evaluate.calibrate import Grams
from rankship_pipeline.merge.tensors import MergeInput, sum_in_order
from rankship_pipeline.models.layers import Layer, matricise, shape_weight
from rankship_pipeline.models.weights import State

# Added to the Gram's diagonal as a share of itself: directions without data keep the average weight.
RIDGE = 1e-6


def merge_joint(given: MergeInput) -> Tensor:
    """The closed form of merging and compressing together: W̄ = (Σ_t W_t G_t)(Σ_t G_t)⁻¹.

    Truncating this W̄ under the summed Gram is the optimum of Σ_t ‖(W − W_t)X_tᵀ‖² over rank-k W. Written as the
    average plus a correction damped by RIDGE, so that directions without data keep the average; it is the optimum up
    to that damping. Embeddings are weighted by each model's token frequencies; biases and norms are averaged.
    """
    average, layer = given.average(), given.layer
    if layer is None or not given.grams or len(given.values) == 1:
        return average
    mean = matricise(average, layer)
    shrunk = [shrink_off_diagonal(gram, given.settings["off_diagonal"]) for gram in given.grams]
    changes = [matricise(value, layer) - mean for value in given.values]
    return shape_weight(mean + _solve(changes, shrunk), average, layer)


def merge_regmean(given: MergeInput) -> Tensor:
    """RegMean (Jin et al. 2023): the same closed form with the Grams' off-diagonals × 0.9.

    Convolutions use the Grams of their patches, which the paper does not do; tensors outside layers are averaged, as in
    the paper.
    """
    return merge_joint(given)


def merge_wudi(given: MergeInput) -> Tensor:
    """The joint form without data: Δ = (Σ_t Δ_t G̃_t)(Σ_t G̃_t)⁺ with G̃_t = Δ_tᵀΔ_t / ‖Δ_t‖² in place of Grams.

    The minimiser of WUDI's loss Σ_t ‖(Δ − Δ_t)Δ_tᵀ‖² / ‖Δ_t‖² (Cheng et al. 2025), which that paper minimises
    by Adam; ACE (Xu et al. 2026) is related. The pseudo-inverse gives the smallest change that attains it. Biases,
    norms and embeddings are averaged.
    """
    changes = given.matrix_changes
    if not changes:
        return given.average()
    proxies = [proxy_gram(change) for change in changes]
    pull = sum_in_order([change @ proxy for change, proxy in zip(changes, proxies, strict=True)])
    return given.add_matrix(pull @ torch.linalg.pinv(sum_in_order(proxies), rtol=RIDGE, hermitian=True))


def proxy_gram(change: Tensor) -> Tensor:
    """G̃ = ΔᵀΔ / ‖Δ‖² (columns, columns): a change's rows span its inputs' directions; zero for no change."""
    energy = change.square().sum()
    return change.T @ change / energy if energy > 0 else change.new_zeros(change.shape[1], change.shape[1])


def _solve(changes: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """(Σ_t Δ_t G_t)(Σ_t G_t + damping)⁻¹ for Δ_t (rows, columns); token frequencies of embeddings are diagonal."""
    total = torch.stack(list(grams)).sum(0)
    pull = torch.stack([_apply(change, gram) for change, gram in zip(changes, grams, strict=True)]).sum(0)
    if total.ndim == 1:
        return pull / (total + RIDGE * total.mean() + 1e-30)
    damped = total + (RIDGE * total.diagonal() + 1e-30).diag()
    correction: Tensor = torch.linalg.solve(damped, pull, left=False)
    return correction


def _apply(weight: Tensor, gram: Tensor) -> Tensor:
    return weight * gram if gram.ndim == 1 else weight @ gram


def shrink_off_diagonal(gram: Tensor, factor: float) -> Tensor:
    """Scale a Gram's off-diagonal elements (RegMean: 0.9 to 1 guards against over-fitting the calibration set)."""
    return gram if factor == 1 or gram.ndim == 1 else factor * gram + (1 - factor) * gram.diagonal().diag()


def measure_interference(merged: State, states: Sequence[State], grams: Sequence[Grams], layer: Layer) -> float:
    """The constant of the joint objective: Σ_t ‖(W̄ − W_t)X_tᵀ‖² as a share of Σ_t ‖W_t X_tᵀ‖².

    It is what merging costs this layer at any rank; near 1 the merged layer keeps nothing of the sources.
    """
    key = f"{layer.name}.weight"
    lost = kept = 0.0
    for state, gram in zip(states, grams, strict=True):
        W = matricise(state[key], layer)
        lost += output_energy(matricise(merged[key], layer) - W, gram[layer.name])
        kept += output_energy(W, gram[layer.name])
    return lost / kept if kept else 0.0


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """‖W Xᵀ‖² = tr(W G Wᵀ) for a (rows, columns) matrix."""
    return float((_apply(weight, gram) * weight).sum())
