"""The grids of rounded weights, such that every toolchain finds the same integers in the float weights.

A rounded weight stays a float tensor. Along each row, or each block of a row, it is a whole number times a scale, and
the largest number is the grid's largest. A toolchain that divides each row (block) by its largest absolute value, as
all of them do for symmetric weights, therefore finds the very scales and integers that were chosen here. Rows are those
of `read_rows`: output channels, and an embedding's tokens.
"""

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.models.layers import Factorable, Kind, stores_inputs_first
from rankship_pipeline.recipe.precision import BLOCK

LARGEST: dict[Precision, int] = {"int8": 127, "int4": 7}  # the largest integer of a symmetric grid
BITS: dict[Precision, int] = {"float32": 32, "float16": 16, "int8": 8, "int4": 4}


@record
class Grid:
    """An operator's grid: its type, and the columns that share a scale (None: the whole row)."""

    precision: Precision
    block: int | None = None


def find_block(kind: Kind, columns: int, precision: Precision) -> int | None:
    """The columns that share a scale: 32 for a linear layer's or embedding's int4; None: the whole row."""
    blocked = precision == "int4" and kind in {"linear", "embedding"} and columns % BLOCK == 0
    return BLOCK if blocked else None


def read_rows(module: Factorable) -> Tensor:
    """A module's weight as the matrix (rows, columns) whose rows have scales of their own, in its own type."""
    weight = module.weight.detach()
    return _turn(module, weight).flatten(1)


@torch.no_grad()
def write_rows(module: Factorable, rows: Tensor) -> None:
    """The inverse of `read_rows`: give the module these weights."""
    turned = _turn(module, module.weight)
    turned.copy_(rows.reshape(turned.shape))


def find_scales(matrix: Tensor, precision: Precision, block: int | None = None) -> Tensor:
    """The scale of every row and block (rows, blocks), float32: its largest absolute value over the grid's largest."""
    largest = _cut(matrix.detach().float(), block).abs().amax(2)
    return torch.where(largest > 0, largest / LARGEST[precision], torch.ones_like(largest))


def read_integers(matrix: Tensor, precision: Precision, block: int | None = None) -> Tensor:
    """The integers (rows, columns), int8, of a matrix (rows, columns) on its grid."""
    limit, scales = LARGEST[precision], find_scales(matrix, precision, block)
    integers = (_cut(matrix.detach().float(), block) / scales[:, :, None]).round().clamp(-limit, limit)
    return integers.reshape(matrix.shape).to(torch.int8)


def is_on_grid(matrix: Tensor, precision: Precision, block: int | None = None) -> bool:
    """Whether rounding the matrix to its grid changes nothing but the last bit of its floats."""
    scales = find_scales(matrix, precision, block)[:, :, None]
    back = _cut(read_integers(matrix, precision, block).float(), block) * scales
    return bool(((back - _cut(matrix.float(), block)).abs() <= 1e-6 * scales * LARGEST[precision]).all())


def _cut(matrix: Tensor, block: int | None) -> Tensor:
    """(rows, blocks, columns of each)."""
    return matrix.reshape(len(matrix), -1, block or max(1, matrix.shape[1]))


def _turn(module: Factorable, weight: Tensor) -> Tensor:
    """The weight with its rows as first axis."""
    inputs_first = stores_inputs_first(module) and not isinstance(module, nn.Embedding)
    return weight.transpose(0, 1) if inputs_first else weight
