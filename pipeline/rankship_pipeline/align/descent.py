"""Measures whether two models share their descent: fine-tuned from one, their weights point one way."""

from collections.abc import Mapping
from math import prod
from statistics import median

import torch
from torch import Tensor

from rankship_pipeline.models.fit_names import match_names
from rankship_pipeline.models.opened import OpenedSource
from rankship_pipeline.models.tensor_pieces import TYPES, Readable, open_pieces
from rankship_pipeline.models.weights import TensorHeader, describe_tensor
from rankship_pipeline.recipe.choices import Recipe

Weights = Mapping[str, Readable | Tensor]
_UNRELATED = 0.2  # the median cosine of unrelated weights is near 0; of fine-tuned ones, mostly above 0.9
_LARGEST, _ELEMENTS = 24, 1 << 20  # weights that are looked at, and numbers of each


def describe_descent(name: str, weights: Weights, reference: str, first: Weights, remedy: str) -> str | None:
    """A caution for a model that seems not to share the first one's descent; None for one that does."""
    cosines = measure_likeness(weights, first)
    if not cosines or median(cosines) >= _UNRELATED:
        return None
    return (
        f"{name} against {reference}: they share no descent, as it seems: the median cosine of their {len(cosines)}"
        f" largest weights is {median(cosines):.2f} (models fine-tuned from one: near 1). The mean of such models"
        f" computes little of use: {remedy}"
    )


def caution(recipe: Recipe, sources: Mapping[str, OpenedSource]) -> list[str]:
    """The cautions on a recipe's models whose weights are there before anything is trained."""
    known = {one.name: _find_weights(sources[one.name]) for one in recipe.models if one.adapter is None}
    if recipe.merge.align is not None or not known:
        return []
    first, *others = known
    remedy = 'write align = "weights" in [merge], or take models that were fine-tuned from one'
    found = [describe_descent(name, known[name], first, known[first], remedy) for name in others]
    return [one for one in found if one is not None]


def _find_weights(opened: OpenedSource) -> Weights:
    """A model's tensors by name; none for one that is still to be trained."""
    if opened.module is not None:
        return opened.module.state_dict()
    return {name: one for path in opened.weights for name, one in open_pieces(path).items()}


def measure_likeness(ours: Weights, first: Weights) -> list[float]:
    """The cosines of the largest matrices and kernels that two models both have, of up to a million numbers each."""
    fit = match_names(*({name: _describe(one) for name, one in each.items()} for each in (first, ours)), where="")
    names = {name: name for name in first.keys() & ours.keys()} if fit is None else fit.names
    pairs = [(ours[own], first[name]) for name, own in sorted(names.items())]
    alike = [
        (one, other)
        for one, other in pairs
        if tuple(one.shape) == tuple(other.shape) and len(one.shape) > 1 and _is_float(one) and _is_float(other)
    ]
    alike.sort(key=lambda pair: -prod(pair[0].shape))
    cosines = [_compare(*pair) for pair in alike[:_LARGEST]]
    return [one for one in cosines if one is not None]


def _describe(one: Readable | Tensor) -> TensorHeader:
    return describe_tensor(one) if isinstance(one, Tensor) else TensorHeader(one.shape, one.type_name)


def _is_float(one: Readable | Tensor) -> bool:
    return TYPES.get(_describe(one).dtype, torch.int8).is_floating_point


def _compare(one: Readable | Tensor, other: Readable | Tensor) -> float | None:
    """The cosine of two tensors' first rows; None if one of them is zero."""
    rows = max(1, _ELEMENTS // max(1, prod(one.shape[1:])))
    left, right = (
        (each[:rows] if isinstance(each, Tensor) else each.read(0, min(rows, each.shape[0]))).double().flatten()
        for each in (one, other)
    )
    norms = float(left.norm() * right.norm())
    return float(left @ right) / norms if norms > 0 else None
