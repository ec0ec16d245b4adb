"""Merges that drop most of every model's change: TIES, DARE, DELLA."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankship_pipeline.merge.tensors import MergeInput, sum_in_order

_MANY, _SAMPLE = 1 << 20, 1 << 16  # above _MANY values, comparing with two bounds is faster than selecting


def merge_ties(given: MergeInput) -> Tensor:
    """Trim, elect sign, disjoint mean: θ_0 + λ·τ_m (Yadav et al. 2023), biases and norms alike.

    Keeps the largest `density` of every tensor, while the paper ranks all parameters of a model together. Equal
    magnitudes at the edge are all kept, so that their order does not matter.
    """
    changes = given.changes
    for change, edge in zip(changes, given.marks, strict=True):
        change[change.abs() < edge] = 0
    return given.origin + given.settings["scale"] * elect_and_average(changes)


def find_edge(magnitudes: Tensor, settings: Mapping[str, float]) -> float:
    """The smallest of a change's magnitudes (elements,) that trimming to `density` keeps."""
    return find_largest(magnitudes, max(1, int(settings["density"] * len(magnitudes)))) if len(magnitudes) else 0.0


def find_largest(values: Tensor, place: int) -> float:
    """The exact `place`-th largest value, counted from 1; for many values a sample first gives bounds around it."""
    if len(values) > _MANY:
        sample = values[:: len(values) // _SAMPLE].sort(descending=True).values
        at, margin = place * len(sample) // len(values), len(sample) // 100
        low, high = float(sample[min(at + margin, len(sample) - 1)]), float(sample[max(at - margin, 0)])
        pieces = values.tensor_split(len(values) // _MANY + 1)  # so that no mask is as long as the values
        above = sum(int((piece > high).sum()) for piece in pieces)
        between = torch.cat([piece[(piece >= low) & (piece <= high)] for piece in pieces])
        if above < place <= above + len(between) < len(values):
            return find_largest(between, place - above)
    return float(values.kthvalue(len(values) - place + 1).values)


def trim(change: Tensor, settings: Mapping[str, float]) -> Tensor:
    """The change with all but its largest `density` set to zero."""
    return torch.where(change.abs() < find_edge(change.abs().flatten(), settings), 0, change)


def elect_and_average(changes: Sequence[Tensor]) -> Tensor:
    """Elect sgn(Σ_t τ_t), then average each element over the models whose change has that sign (TIES)."""
    elected = sum_in_order(changes).sign_()
    kept, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for change in changes:
        agrees = change * elected > 0
        kept += torch.where(agrees, change, 0)
        agreeing += agrees
    return kept.div_(agreeing.clamp_min_(1))


def merge_dare(given: MergeInput) -> Tensor:
    """θ_0 + λ Σ_t τ̂_t, τ̂_t = (1 − m) ⊙ τ_t / (1 − p), m ~ Bernoulli(p) (Yu et al. 2024, on task arithmetic).

    Biases and norms alike. The default p is that of the authors' own merging command; they use 0.9 and more for changes
    as small as those of fine-tuned language models.
    """
    drop = given.settings["drop"]
    sparse = [
        torch.where(_draw(change, generator) < drop, 0, change) / (1 - drop)
        for change, generator in zip(given.changes, given.generators, strict=True)
    ]
    return given.origin + given.settings["scale"] * sum_in_order(sparse)


def merge_della(given: MergeInput) -> Tensor:
    """Drop small changes more often than large ones, rescale, elect, average (Deep et al. 2024, MagPrune).

    Within each row (a neuron) of n changes the r-th largest, from 0, is dropped with p_r = p − ε/2 + r·ε/n and else
    divided by 1 − p_r; then as in TIES: θ_0 + λ·τ_m. Biases and norms are one row.
    """
    settings = given.settings
    sparse = []
    for change, generator in zip(given.changes, given.generators, strict=True):
        rows = change.flatten(1) if change.ndim > 1 else change.reshape(1, -1)
        order = rows.abs().argsort(dim=1, descending=True, stable=True)
        ranks = torch.empty_like(order).scatter_(1, order, torch.arange(rows.shape[1]).expand_as(order).contiguous())
        chance = settings["drop"] - settings["epsilon"] / 2 + ranks.to(rows.dtype) * settings["epsilon"] / rows.shape[1]
        kept = torch.where(_draw(rows, generator) < chance, 0, rows / (1 - chance))
        sparse.append(kept.reshape(change.shape))
    return given.origin + settings["scale"] * elect_and_average(sparse)


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), float32 whatever the tensor's type: the same mask in memory and streamed."""
    return torch.rand(like.shape, generator=generator, dtype=torch.float32)
