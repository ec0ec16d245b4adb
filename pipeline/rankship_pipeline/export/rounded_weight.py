"""Weights of fewer bits as files store them, in one shape for all formats, and what to say where they are not there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import BuildError

Integers = NDArray[np.int8]
Floats = NDArray[np.float32]
Array = NDArray[Any]

_CLOSE = 2e-6  # of a row's largest number: what dividing by a scale and multiplying again may change


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """One weight of fewer bits: integers (rows, columns), in torch's order, outputs first, and scales (rows, blocks).

    Each block of columns has one scale; with one block a row has one. `name` is the layer's, or what a file calls it.
    """

    name: str
    precision: Precision
    integers: Integers
    scales: Floats

    @property
    def matrix(self) -> Floats:
        """The numbers that are meant, (rows, columns)."""
        rows, blocks = self.scales.shape
        spread = self.integers.reshape(rows, blocks, -1) * self.scales[:, :, None]
        return spread.reshape(self.integers.shape).astype(np.float32)

    @property
    def block(self) -> int:
        """How many numbers of a row share a scale."""
        return int(self.integers.shape[1] // self.scales.shape[1])


def store(name: str, precision: Precision, integers: Tensor, scales: Tensor) -> RoundedWeight:
    """A weight of the grid: integers of any shape with the outputs first, scales (rows, blocks)."""
    rows = len(scales)
    return RoundedWeight(
        name=name,
        precision=precision,
        integers=integers.detach().reshape(rows, -1).numpy().astype(np.int8),
        scales=scales.detach().reshape(rows, -1).numpy().astype(np.float32),
    )


def pack_nibbles(integers: Array) -> NDArray[np.uint8]:
    """Two integers of 4 bits a byte along the last axis, the first in the lower half."""
    low = integers.astype(np.int16) & 15
    if low.shape[-1] % 2:
        low = np.concatenate([low, np.zeros_like(low[..., :1])], -1)
    packed: NDArray[np.uint8] = (low[..., 0::2] | (low[..., 1::2] << 4)).astype(np.uint8)
    return packed


def unpack_nibbles(packed: NDArray[np.uint8], count: int) -> NDArray[np.int16]:
    """The integers of 4 bits, without their sign, along the last axis."""
    both = np.stack([packed & 15, packed >> 4], -1).astype(np.int16)
    return both.reshape(*packed.shape[:-1], -1)[..., :count]


def merge_blocks(one: RoundedWeight) -> RoundedWeight:
    """The weight with one scale a row, if all blocks of each row have the same: some operators know blocks only."""
    if (one.scales == one.scales[:, :1]).all():
        return replace(one, scales=one.scales[:, :1])
    return one


def find_same(matrix: Floats, weights: Sequence[RoundedWeight]) -> RoundedWeight | None:
    """The weight whose numbers a float matrix (rows, columns) holds, perhaps each row by a factor; None without one.

    Converters multiply a query's weights by the scale of its attention, and a convolution's by the normalisation after
    it. The integers stay, or change sign; the scales are the matrix's own.
    """
    fitting = [one for one in weights if one.integers.shape == matrix.shape]
    for one in fitting:
        if is_same(matrix[:1], one.matrix[:1]) and is_same(matrix, one.matrix):
            return one
    scaled = (_rescale(matrix, one) for one in fitting)
    return next((one for one in scaled if one is not None and is_same(matrix, one.matrix)), None)


def _rescale(matrix: Floats, one: RoundedWeight) -> RoundedWeight | None:
    """The weight with the scales by which a matrix is its integers; None where files could not store these scales."""
    rows, blocks = one.scales.shape
    integers, numbers = one.integers.reshape(rows, blocks, -1), matrix.reshape(rows, blocks, -1)
    largest = np.abs(integers.astype(np.int16)).argmax(-1)[:, :, None]
    least, most = (np.take_along_axis(side, largest, -1)[:, :, 0] for side in (integers, numbers))
    scales = np.where(least != 0, most / np.where(least == 0, 1, least), one.scales).astype(np.float32)
    signs = np.where(scales < 0, -1, 1).astype(np.int8)
    scales = np.abs(scales)
    if blocks > 1 and (scales.view(np.uint32) & 0xFFFF).any():  # those of blocks are stored as bfloat16
        return None
    return replace(one, integers=(integers * signs[:, :, None]).reshape(matrix.shape), scales=scales)


def list_stored(weights: Sequence[RoundedWeight], stored: Sequence[RoundedWeight]) -> tuple[RoundedWeight, ...]:
    """Those of the weights whose integers are among the stored ones, with their scales; tied layers have one table."""
    by_name = {one.name: one for one in stored}
    found = ((one, by_name.get(one.name) or find_same(one.matrix, stored)) for one in weights)
    return tuple(
        one if is_equal(one, other) else replace(other, name=one.name) for one, other in found if other is not None
    )


def is_equal(one: RoundedWeight, other: RoundedWeight) -> bool:
    """Whether two weights have the same integers and scales, whatever they are called."""
    return np.array_equal(one.scales, other.scales) and np.array_equal(one.integers, other.integers)


def is_same(left: Floats, right: Floats) -> bool:
    """Whether two matrices hold the same numbers but for their last bits."""
    limit = _CLOSE * max(float(np.abs(right).max(initial=0)), 1e-30)
    return bool((np.abs(left - right) <= limit).all())


def check_weights(expected: Sequence[RoundedWeight], found: Sequence[RoundedWeight], *, where: str) -> None:
    """Check bit by bit that a file stores every expected weight; BuildError says of each what is wrong with it."""
    by_shape: dict[tuple[int, ...], list[RoundedWeight]] = {}
    for one in found:
        by_shape.setdefault(one.integers.shape, []).append(one)
    complaints = [f"{one.name}: {text}" for one in expected for text in _complain(one, by_shape)]
    if complaints:
        raise BuildError(
            f"{where}: weights are not stored as they were rounded:\n  " + "\n  ".join(complaints),
            hint="the exporter rounded anew; try another version of it, or leave the precision out",
        )


def _complain(one: RoundedWeight, by_shape: Mapping[tuple[int, ...], Sequence[RoundedWeight]]) -> Iterator[str]:
    candidates = by_shape.get(one.integers.shape, ())
    rows, columns = one.integers.shape
    if not candidates:
        yield f"no rounded weight of shape {rows}x{columns} in the file"
        return
    closest = min(candidates, key=lambda other: int((other.integers != one.integers).sum()))
    if wrong := int((closest.integers != one.integers).sum()):
        yield f"{wrong:,} of {rows * columns:,} integers differ in the closest weight of its shape, {closest.name}"
        return
    same = [other for other in candidates if np.array_equal(other.integers, one.integers)]
    if not any(_has_scales(other, one) for other in same):
        yield f"the scales of {closest.name}, {_show(closest)}, are not those that were chosen, {_show(one)}"
    if all(other.precision != one.precision for other in same):
        yield f"{closest.name} is stored as {closest.precision}, not as {one.precision}"


def _has_scales(other: RoundedWeight, one: RoundedWeight) -> bool:
    other, one = merge_blocks(other), merge_blocks(one)
    if other.scales.shape != one.scales.shape:
        return False
    rows, blocks = one.scales.shape
    matters = one.integers.reshape(rows, blocks, -1).any(-1)  # zeros may have any scale
    # dividing by 127 and by 7 may round the last bit otherwise
    return bool((np.abs(other.scales - one.scales) <= 3e-7 * one.scales)[matters].all())


def _show(one: RoundedWeight) -> str:
    rows, blocks = one.scales.shape
    return f"{rows}x{blocks} of mean {float(one.scales.mean()):.4g}"
