"""Rounds one matrix to its grid: to the nearest, or by what the inputs make of the errors (GPTQ).

GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds column by column, and lets the columns to come make up for each
error as far as the inputs' Gram allows. The implementations at hand do not fit: torchao's needs CUDA and linear layers,
ai-edge-quantizer's a TFLite file; neither takes a Gram, or leaves integers that other toolchains find again.
"""

import torch
from torch import Tensor

from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.quantise.grid import LARGEST

# The largest weights that are tried, as shares of the largest absolute weight of a row or block.
_CLIPS: dict[Precision, tuple[float, ...]] = {
    "int8": (1.0, 0.95, 0.9),
    "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6),
}
DAMPING = 0.01  # added to the Gram's diagonal as a share of its mean, as GPTQ does
_SHRINKING = 0.97  # of the scale of a block that does not reach the grid's largest integer, and how often
_TRIES = 4
_LAZY = 128  # columns whose errors are passed on to those after them at once


def round_matrix(matrix: Tensor, precision: Precision, gram: Tensor | None = None, block: int | None = None) -> Tensor:
    """The matrix (rows, columns) on its grid (see grid.py), in its own type.

    Every row's or block's clip is the one of least squared error, weighed by the diagonal of the inputs' `gram`
    (columns, columns). With a Gram each row is then rounded by GPTQ where that has the smaller error on these inputs;
    with its diagonal alone (columns,), or without, to the nearest.
    """
    exact = matrix.detach().double()
    weights = torch.ones(exact.shape[1], dtype=torch.float64)
    if gram is not None:
        weights = (gram if gram.ndim == 1 else gram.diagonal()).double().clamp_min(0)
    scales = _choose_scales(exact, precision, weights + DAMPING * weights.mean(), block)
    nearest = _to_nearest(exact, scales, precision, block)
    if gram is None or gram.ndim == 1 or not bool(gram.any()):
        return nearest.to(matrix.dtype)
    damped = gram.double() + DAMPING * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)
    found = _round_by_inputs(exact, damped, scales, precision, block)
    is_better = _measure(exact - found, damped) < _measure(exact - nearest, damped)
    return torch.where(is_better[:, None], found, nearest).to(matrix.dtype)


def _measure(change: Tensor, gram: Tensor) -> Tensor:
    """The error of every row on the inputs."""
    return ((change @ gram) * change).sum(1)


def _choose_scales(matrix: Tensor, precision: Precision, weights: Tensor, block: int | None) -> Tensor:
    """Every row's and block's scale (rows, blocks) of least error."""
    rows, columns = matrix.shape
    largest = _largest(matrix, block)
    full = torch.where(largest > 0, largest / LARGEST[precision], torch.ones_like(largest))
    best, least = full, torch.full_like(full, torch.inf)
    for clip in _CLIPS[precision]:
        scales = _shorten(full * clip, block)
        change = matrix - _to_nearest(matrix, scales, precision, block)
        error = (change.square() * weights).reshape(rows, -1, block or columns).sum(2)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def _shorten(scales: Tensor, block: int | None) -> Tensor:
    """Scales as files store them: TFLite and ExecuTorch keep those of blocks in bfloat16."""
    return scales if block is None else scales.bfloat16().to(scales.dtype)


def _to_nearest(matrix: Tensor, scales: Tensor, precision: Precision, block: int | None) -> Tensor:
    wide, limit = _widen(scales, matrix, block), LARGEST[precision]
    return (matrix / wide).round().clamp(-limit, limit) * wide


def _widen(scales: Tensor, matrix: Tensor, block: int | None) -> Tensor:
    """Every element's scale (rows, columns)."""
    return scales.repeat_interleave(block or matrix.shape[1], 1)


def _round_by_inputs(matrix: Tensor, damped: Tensor, scales: Tensor, precision: Precision, block: int | None) -> Tensor:
    """Round by GPTQ; a row in which the errors' share leaves a block below the largest integer, with smaller scales.

    Rows that stay below are rounded to the nearest, which reaches it.
    """
    order = damped.diagonal().argsort(descending=True)
    back = order.argsort()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    U = torch.linalg.cholesky(inverse, upper=True)
    result = _to_nearest(matrix, scales, precision, block)
    left, scales = torch.arange(len(matrix)), scales.clone()
    for _ in range(_TRIES):
        wide = _widen(scales[left], matrix, block)
        limits = (_widen(_largest(matrix[left], block), matrix, block) > 0) * LARGEST[precision]  # zeros stay zeros
        integers = _pass_errors_on(matrix[left][:, order], wide[:, order], U, limits[:, order])[:, back]
        reached = _largest(integers, block)
        short = (reached < LARGEST[precision]) & (_largest(matrix[left], block) > 0)
        done = ~short.any(1)
        result[left[done]] = integers[done] * wide[done]
        scales[left] = torch.where(short, _shorten(scales[left] * _SHRINKING, block), scales[left])
        left = left[~done]
        if not len(left):
            break
    return result


def _largest(matrix: Tensor, block: int | None) -> Tensor:
    return matrix.reshape(len(matrix), -1, block or matrix.shape[1]).abs().amax(2)


def _pass_errors_on(matrix: Tensor, wide: Tensor, U: Tensor, limits: Tensor) -> Tensor:
    """The integers, column by column; U is the upper Cholesky factor of the inverse Gram."""
    left, integers = matrix.clone(), torch.zeros_like(matrix)
    for start in range(0, matrix.shape[1], _LAZY):
        stop = min(start + _LAZY, matrix.shape[1])
        errors = matrix.new_zeros(len(matrix), stop - start)
        for column in range(start, stop):
            scale = wide[:, column]
            integers[:, column] = (left[:, column] / scale).round_().clamp_(-limits[:, column], limits[:, column])
            error = (left[:, column] - integers[:, column] * scale) / U[column, column]
            left[:, column:stop].addr_(error, U[column, column:stop], alpha=-1)
            errors[:, column - start] = error
        left[:, stop:] -= errors @ U[start:stop, stop:]
    return integers
