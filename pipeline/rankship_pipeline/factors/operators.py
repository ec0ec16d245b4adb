"""The smaller operators that replace a layer: their sizes and modules."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Operator(NamedTuple):
    """One operator as a matrix, and the grid that it runs on.

    `on_outputs` says for each axis (height, width) whether the operator runs at the layer's output positions, with its
    stride, or at its input positions.
    """

    rows: int
    columns: int
    on_outputs: tuple[bool, bool] = (True, True)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    @property
    def elements(self) -> int:
        """The number of weights."""
        return self.rows * self.columns


def cut_convolution(
    module: nn.Conv2d, inputs: int, outputs: int, axes: tuple[bool, bool] = (True, True), *, bias: bool = False
) -> nn.Conv2d:
    """A convolution with the module's kernel, stride, padding and dilation along some axes (height, width)."""

    def along(pair: Sequence[int], neutral: int) -> tuple[int, int]:
        height, width = (int(value) if kept else neutral for value, kept in zip(pair, axes, strict=True))
        return height, width

    return nn.Conv2d(
        inputs,
        outputs,
        along(module.kernel_size, 1),
        along(module.stride, 1),
        module.padding if isinstance(module.padding, str) else along(module.padding, 0),
        along(module.dilation, 1),
        bias=bias,
    )


def pad_basis(basis: Tensor, count: int) -> Tensor:
    """The first `count` rows of a basis, filled up with zero rows if the inputs span fewer directions."""
    basis = basis[:count]
    return torch.cat([basis, basis.new_zeros(count - len(basis), basis.shape[1])])
