"""Merges that are weighted sums of the models."""

import math

import torch
from torch import Tensor

from rankship_pipeline.merge.tensors import MergeInput, sum_in_order

_COLLINEAR = 1e-6  # sin of the angle below which a great circle is a straight line


def merge_average(given: MergeInput) -> Tensor:
    """The plain mean (ARP, step 1, with w_t = 1/T; Wortsman et al. 2022), biases and norms alike."""
    return given.average()


def merge_task_arithmetic(given: MergeInput) -> Tensor:
    """θ_0 + λ Σ_t τ_t (Ilharco et al. 2023), biases and norms alike; λ = 1 is plain addition of adapters."""
    return given.origin + given.settings["scale"] * sum_in_order(given.changes)


def merge_slerp(given: MergeInput) -> Tensor:
    """sin((1−t)Ω)/sin Ω · θ_1 + sin(tΩ)/sin Ω · θ_2, Ω the angle between the two tensors (Shoemake 1985).

    Each tensor by itself, biases and norms alike; linear interpolation if the two are collinear or one is zero.
    """
    first, second = given.values
    position = given.settings["position"]
    angle = math.acos(_cosine(first, second))
    if math.sin(angle) < _COLLINEAR or not (first.any() and second.any()):
        return (1 - position) * first + position * second
    weights = (math.sin((1 - position) * angle) / math.sin(angle), math.sin(position * angle) / math.sin(angle))
    return weights[0] * first + weights[1] * second


def merge_model_stock(given: MergeInput) -> Tensor:
    """t·mean + (1−t)·θ_0 with t = N·cos θ / (1 + (N−1)·cos θ) (Jang et al. 2024).

    θ is the angle between two task vectors, its cosine the mean over all pairs, for each tensor by itself, biases and
    norms alike. A negative mean cosine, which the paper does not discuss, counts as 0: the base is kept.
    """
    changes, count = given.changes, given.count
    pairs = [(one, other) for index, one in enumerate(changes) for other in changes[:index]]
    cosine = max(0.0, sum(_cosine(*pair) for pair in pairs) / len(pairs)) if pairs else 1.0
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return given.origin + (ratio / count) * sum_in_order(changes)


def _cosine(one: Tensor, other: Tensor) -> float:
    """The cosine of the angle between two tensors, within [−1, 1]; 0 if either is zero."""
    norms = float(torch.linalg.vector_norm(one)) * float(torch.linalg.vector_norm(other))
    return max(-1.0, min(1.0, float(torch.dot(one.flatten(), other.flatten())) / norms)) if norms else 0.0
