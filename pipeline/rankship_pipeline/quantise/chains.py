"""Rounds the operators that a layer would be stored as, and measures what the layer would then lose.

The links of a chain are rotated (see basis.py): where components' energies differ that loses less than balanced ones.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rankship_pipeline.factors import forms
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.models.layers import Kind, Layer
from rankship_pipeline.quantise.basis import rotate, turn_link
from rankship_pipeline.quantise.grid import find_block
from rankship_pipeline.quantise.rounding import DAMPING, round_matrix
from rankship_pipeline.quantise.sizes import find_operator_kind

_WIDEST = 2048  # columns up to which rounding for an estimate reads the whole Gram
_POINTS = 5  # candidates of one form and type that are rounded


def approximate(taken: Decomposition, stored: Stored) -> Tensor:
    """The matrix in the place of `taken.weight` that a layer stored so computes."""
    if stored.weights == "float32":
        return taken.weight if stored.factors is None else forms.approximate(taken, stored.factors)
    if stored.factors is None:
        return _round(taken.weight, stored.weights, find_operator_kind(taken.layer, 0), _narrow(taken.gram))
    return forms.compose(taken.layer, stored.factors, _round_chain(taken, stored.factors, stored.weights))


def measure_error(taken: Decomposition, stored: Stored) -> float:
    """The share of the output energy that a layer stored so loses, by rank and by rounding."""
    if not taken.total:
        return 0.0
    return max(0.0, taken.measure(taken.weight - approximate(taken, stored), taken.gram) / taken.total)


def _round_chain(taken: Decomposition, factors: Factors, precision: Precision) -> list[Tensor]:
    """A form's weights, rotated and rounded one after another, the last refitted to those before it."""
    weights = list(forms.FORMS[factors.form].make_weights(taken, factors))
    for at in range(len(weights) - 1):
        turn = rotate(len(weights[at]), weights[at])
        weights[at : at + 2] = turn_link(weights[at], weights[at + 1], turn)
    gram = taken.gram
    for at, weight in enumerate(weights):
        matrix, own = weight.flatten(1), gram
        if at == 0:
            own = _share_gram(taken, weight)
        else:
            seen = _list_inputs(taken.layer, factors, weights, at)  # (columns of the operator, columns of the layer)
            crossed = seen * gram if gram.ndim == 1 else seen @ gram
            own = crossed @ seen.T
            if at == len(weights) - 1:
                matrix = _fit(taken.weight @ crossed.T, own)
        weights[at] = _round(matrix, precision, find_operator_kind(taken.layer, at), _narrow(own)).reshape(weight.shape)
    return weights


def _fit(cross: Tensor, gram: Tensor) -> Tensor:
    """The last operator's least squares: cross·gram⁻¹, damped as rounding is, but a thousandth of it."""
    damped = gram + 1e-3 * DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped)).T


def _round(matrix: Tensor, precision: Precision, kind: Kind, gram: Tensor | None) -> Tensor:
    """Round a matrix (rows, columns) along its rows, an embedding's (dimension, tokens) along its columns."""
    if kind == "embedding":
        return round_matrix(matrix.T, precision, None, find_block(kind, len(matrix), precision)).T
    return round_matrix(matrix, precision, gram, find_block(kind, matrix.shape[1], precision))


def _narrow(gram: Tensor) -> Tensor:
    return gram if gram.ndim == 1 or len(gram) <= _WIDEST else gram.diagonal()


def _share_gram(taken: Decomposition, weight: Tensor) -> Tensor:
    """The Gram of the first operator's inputs: over the axes of the kernel that it lacks, the layer's is summed up."""
    layer, gram = taken.layer, taken.gram
    if weight[0].numel() == len(gram):
        return gram
    if weight.ndim == 2:  # noqa: PLR2004 - a matrix, on the first inputs alone
        return gram[: weight.shape[1], : weight.shape[1]]
    (height, width), channels = layer.kernel, layer.channels
    whole = gram.reshape(channels, height, width, channels, height, width)
    if weight.shape[2] > 1:
        return torch.einsum("ihwjgw->ihjg", whole).reshape(channels * height, -1)
    return torch.einsum("ihwjhw->ij", whole)


def _list_inputs(layer: Layer, factors: Factors, weights: Sequence[Tensor], at: int) -> Tensor:
    """What the operator at this place reads, as a matrix on the layer's inputs: (its columns, the layer's).

    It is the chain with the identity in the operator's place, and with identities after it.
    """
    size = weights[at][0].numel()
    identity = torch.eye(size, dtype=weights[at].dtype)
    others = [identity.reshape(size, *weights[at].shape[1:])]
    others += [identity.reshape(size, size, *[1] * (one.ndim - 2)) for one in weights[at + 1 :]]
    return forms.compose(replace(layer, rows=size), factors, [*weights[:at], *others])


def estimate_errors(taken: Decomposition, candidates: Sequence[forms.Candidate], precision: Precision) -> list[float]:
    """The errors of float32 candidates of one form, by rising cost, once rounded: measured for a few, and between them.

    What rounding adds changes slowly with size: its logarithm is taken to be linear in that of the cost.
    """
    if not candidates:
        return []
    places = sorted({round(share) for share in np.linspace(0, len(candidates) - 1, _POINTS)})
    costs = np.log([one.cost for one in candidates])
    known = [_measure_added(taken, candidates[place], precision) for place in places]
    added = np.exp(np.interp(costs, costs[places], np.log(known)))
    return [one.error + float(more) for one, more in zip(candidates, added, strict=True)]


def _measure_added(taken: Decomposition, one: forms.Candidate, precision: Precision) -> float:
    """The error that rounding adds to a candidate's own, above zero."""
    return max(measure_error(taken, Stored(factors=one.factors, weights=precision)) - one.error, 1e-12)
