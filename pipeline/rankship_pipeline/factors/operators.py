"""The smaller operators that replace a layer: their sizes and modules."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankship_pipeline.models.layers import Convolution, Transposed


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
    module: Convolution, inputs: int, outputs: int, axes: tuple[bool, bool] = (True, True), *, bias: bool = False
) -> Convolution:
    """A convolution with the module's kernel, stride, padding and dilation along some axes (height, width)."""
    kept = axes[-len(module.kernel_size) :]

    def along(values: Sequence[int], neutral: int) -> tuple[int, ...]:
        return tuple(int(value) if one else neutral for value, one in zip(values, kept, strict=True))

    return type_of(module)(
        inputs,
        outputs,
        along(module.kernel_size, 1),  # type: ignore[arg-type]  # as many as the module has axes
        along(module.stride, 1),  # type: ignore[arg-type]
        module.padding if isinstance(module.padding, str) else along(module.padding, 0),  # type: ignore[arg-type]
        along(module.dilation, 1),  # type: ignore[arg-type]
        bias=bias,
        padding_mode=module.padding_mode,
    )


def make_pointwise(module: Convolution | Transposed, inputs: int, outputs: int, *, bias: bool = False) -> Convolution:
    """A convolution with a kernel of 1 over as many axes as the module's."""
    return type_of(module)(inputs, outputs, 1, bias=bias)


def type_of(module: Convolution | Transposed) -> type[nn.Conv1d | nn.Conv2d]:
    """The convolution over as many axes."""
    return nn.Conv1d if len(module.kernel_size) == 1 else nn.Conv2d


def narrow_transposed(module: Transposed, inputs: int) -> Transposed:
    """A transposed convolution like the module, from fewer channels; its bias as the module has one."""
    kind = nn.ConvTranspose1d if len(module.kernel_size) == 1 else nn.ConvTranspose2d
    return kind(
        inputs,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]  # as many as the module has axes
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.output_padding,  # type: ignore[arg-type]
        bias=module.bias is not None,
        dilation=module.dilation,  # type: ignore[arg-type]
    )


def pad_basis(basis: Tensor, count: int) -> Tensor:
    """The first `count` rows of a basis, filled up with zero rows if the inputs span fewer directions."""
    basis = basis[:count]
    return torch.cat([basis, basis.new_zeros(count - len(basis), basis.shape[1])])
