"""Several trained models of one architecture into one, layer by layer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rankship_pipeline.calibrate import Grams
from rankship_pipeline.checkpoint import State
from rankship_pipeline.layers import Layer, matricise, shape_weight
from rankship_pipeline.recipe import MergeChoice

# Added to the Gram's diagonal as a share of its mean diagonal: directions no data excites keep the average weight.
RIDGE = 1e-6

Merge = Callable[[Sequence[State], Sequence[Grams], Sequence[Layer], MergeChoice], State]


def merge_average(
    states: Sequence[State], _grams: Sequence[Grams], _layers: Sequence[Layer], _choice: MergeChoice
) -> State:
    """The plain mean of every floating-point tensor (ARP, step 1, with w_t = 1/T); integers come from the first."""
    return {
        name: torch.stack([state[name].to(torch.float64) for state in states]).mean(0).to(first.dtype)
        if first.is_floating_point()
        else first.clone()
        for name, first in states[0].items()
    }


def merge_joint(states: Sequence[State], grams: Sequence[Grams], layers: Sequence[Layer], choice: MergeChoice) -> State:
    """The closed form of merging and compressing together: W̄ = (Σ_t W_t G_t)(Σ_t G_t)⁻¹ (METHODS §3, RegMean).

    Truncating this W̄ under the summed Gram is the optimum of Σ_t ‖(W − W_t)X_tᵀ‖² over rank-k W. Written as the
    average plus a correction damped by RIDGE, so that directions without data keep the average; it is the optimum up
    to that damping. Biases and norms are averaged.
    """
    merged = merge_average(states, grams, layers, choice)
    for layer in layers:
        key = f"{layer.name}.weight"
        mean = matricise(merged[key], layer)
        shrunk = [shrink_off_diagonal(gram[layer.name], choice.off_diagonal) for gram in grams]
        changes = [matricise(state[key], layer) - mean for state in states]
        merged[key] = shape_weight(mean + _solve(changes, shrunk), merged[key], layer)
    return merged


MERGES: dict[str, Merge] = {
    "average": merge_average,
    "joint": merge_joint,
}


def _solve(changes: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """(Σ_t Δ_t G_t)(Σ_t G_t + damping)⁻¹ for Δ_t (rows, columns); token frequencies of embeddings are diagonal."""
    total = torch.stack(list(grams)).sum(0)
    pull = torch.stack([_apply(change, gram) for change, gram in zip(changes, grams, strict=True)]).sum(0)
    if total.ndim == 1:
        return pull / (total + RIDGE * total.mean() + 1e-30)
    damped = total + torch.eye(len(total), dtype=total.dtype) * (RIDGE * total.diagonal().mean() + 1e-30)
    correction: Tensor = torch.linalg.solve(damped, pull, left=False)
    return correction


def _apply(weight: Tensor, gram: Tensor) -> Tensor:
    return weight * gram if gram.ndim == 1 else weight @ gram


def shrink_off_diagonal(gram: Tensor, factor: float) -> Tensor:
    """Scale a Gram's off-diagonal elements (RegMean §3.2: 0.9 to 1 guards against over-fitting the calibration set)."""
    return gram if factor == 1 or gram.ndim == 1 else factor * gram + (1 - factor) * gram.diagonal().diag()


def measure_interference(merged: State, states: Sequence[State], grams: Sequence[Grams], layer: Layer) -> float:
    """The constant of the joint objective: Σ_t ‖(W̄ − W_t)X_tᵀ‖² as a share of Σ_t ‖W_t X_tᵀ‖².

    What merging costs this layer whatever the rank; near 1 the merge is hopeless here.
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
