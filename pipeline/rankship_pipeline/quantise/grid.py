"""The grids of rounded weights, such that every toolchain finds the same integers in the float weights.

A rounded weight stays a float tensor. Along each row it is a whole number times a scale, and the row's largest number
is the grid's largest. A toolchain that divides each row by its largest absolute value, as all of them do for symmetric
weights per output channel, therefore finds the very scales and integers that were chosen here.
"""

from typing import get_args

import torch
from torch import Tensor

from rankship_pipeline.foundation.artifact_key import Precision

LARGEST: dict[Precision, int] = {"int8": 127, "int4": 7}  # the largest integer of a symmetric grid
BITS: dict[Precision, int] = {"float32": 32, "float16": 16, "int8": 8, "int4": 4}
assert set(BITS) == set(get_args(Precision))  # noqa: S101


def find_scales(matrix: Tensor, precision: Precision) -> Tensor:
    """The scale of every row (rows, 1), float32: its largest absolute value over the grid's largest integer."""
    largest = matrix.detach().float().abs().amax(1, keepdim=True)
    return torch.where(largest > 0, largest / LARGEST[precision], torch.ones_like(largest))


def read_integers(matrix: Tensor, precision: Precision) -> Tensor:
    """The integers (rows, columns), int8, of a matrix (rows, columns) on its grid."""
    limit = LARGEST[precision]
    return (matrix.detach().float() / find_scales(matrix, precision)).round().clamp(-limit, limit).to(torch.int8)


def is_on_grid(matrix: Tensor, precision: Precision) -> bool:
    """Whether rounding the matrix to its grid changes nothing but the last bit of its floats."""
    scales = find_scales(matrix, precision)
    back = read_integers(matrix, precision).float() * scales
    return bool(((back - matrix.float()).abs() <= 1e-6 * scales * LARGEST[precision]).all())
