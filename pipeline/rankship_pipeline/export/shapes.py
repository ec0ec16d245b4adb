"""Lengths that may vary: which axes of a module's inputs, in which range, and where in it a file is proven."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.records import Dimension, TensorSpec
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.recipe.export_choices import BATCH_AXIS, AxisChoice, ExportChoice

Axes = tuple[Mapping[int, Dimension], ...]  # of each input, by axis
Point = Mapping[str, int]  # a length for each dimension, by its name
Shape = tuple[int, ...]
Sides = tuple[int | Dimension, ...]

_PROOF_SAMPLES = 8  # at each point, besides those at the data's own shape
_FEW = 4  # numbers of samples, up to which a format of fixed shapes gets a file for each


def find_axes(choice: ExportChoice, module: nn.Module, samples: Inputs) -> Axes:
    """Find the axes that a recipe lets vary in a module's inputs; InputError names what does not fit the samples."""
    if choice.batch is None and not choice.axes:
        return ()
    names = name_inputs(module, len(samples))
    shapes = {name: tuple(tensor.shape) for name, tensor in zip(names, samples, strict=True)}
    found: dict[str, dict[int, Dimension]] = {name: {} for name in names}
    if choice.batch is not None:
        low, high = choice.batch
        for axes in found.values():
            axes[0] = Dimension(name=BATCH_AXIS, low=low, high=high, example=1)
    examples: dict[str, int] = {}
    for axis in choice.axes:
        for name in _list_inputs(axis, shapes):
            length = shapes[name][axis.axis]
            if examples.setdefault(axis.name, length) != length:
                raise InputError(
                    f"export.axes {axis.name!r}: the inputs differ along it: {length} in axis {axis.axis} of {name!r},"
                    f" {examples[axis.name]} elsewhere",
                    hint=f"name in `inputs` those that share it; the model's inputs are {_show_shapes(shapes)}",
                )
            low, high = axis.range
            if not low <= length <= high:
                raise InputError(
                    f"export.axes {axis.name!r}: the data have length {length} there, outside [{low}, {high}]",
                    hint="widen the range, or give data of a length within it: files are timed with the data's shape",
                )
            if axis.axis in found[name]:
                raise InputError(
                    f"export.axes: axis {axis.axis} of {name!r} has two names, {found[name][axis.axis].name!r} and"
                    f" {axis.name!r}",
                    hint="leave one out",
                )
            found[name][axis.axis] = Dimension(name=axis.name, low=low, high=high, example=length)
    return tuple(found.values())


def name_inputs(module: nn.Module, count: int) -> tuple[str, ...]:
    """Name a module's `count` inputs as a Hugging Face model or its forward does, else input.0, input.1, …."""
    given = getattr(module, "inputs", ())  # of huggingface.LogitsOnly
    if not isinstance(given, tuple) or len(given) < count:
        parameters = inspect.signature(module.forward).parameters.values()
        positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
        given = tuple(one.name for one in parameters if one.kind in positional)
    return given[:count] if len(given) >= count else tuple(f"input.{place}" for place in range(count))


def _list_inputs(axis: AxisChoice, shapes: Mapping[str, Shape]) -> list[str]:
    """The names of the inputs that have an axis of the recipe."""
    where = f"export.axes {axis.name!r}"
    if unknown := [name for name in axis.inputs if name not in shapes]:
        raise InputError(
            f"{where}: the model has no input {', '.join(unknown)}", hint=f"its inputs are {_show_shapes(shapes)}"
        )
    having = [name for name, shape in shapes.items() if axis.axis < len(shape)]
    if not having or (short := [name for name in axis.inputs if name not in having]):
        whose = "no input" if not having else ", ".join(short)
        raise InputError(
            f"{where}: there is no axis {axis.axis} in {whose}"
            if having
            else f"{where}: no input has axis {axis.axis}",
            hint=f"axes count from 0, the batch; the model's inputs are {_show_shapes(shapes)}",
        )
    return list(axis.inputs) or having


def _show_shapes(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, ('samples', *shape[1:])))})" for name, shape in shapes.items())


def list_dimensions(sides: Iterable[int | Dimension]) -> tuple[Dimension, ...]:
    """Every dimension among the sides of some tensors, once."""
    return tuple(dict.fromkeys(side for side in sides if isinstance(side, Dimension)))


def list_points(dimensions: Sequence[Dimension]) -> list[Point]:
    """The points where a file is proven besides its example: all dimensions lowest, highest, and between.

    Between, no two dimensions lie at the same share of their range, so that one cannot stand for another.
    """
    if not dimensions:
        return []
    shares = len(dimensions) + 1
    points = [
        {one.name: one.low for one in dimensions},
        {one.name: one.high for one in dimensions},
        {one.name: one.low + (one.high - one.low) * place // shares for place, one in enumerate(dimensions, 1)},
    ]
    return _leave_out_doubles([find_example(dimensions), *points])[1:]


def list_fixed_points(dimensions: Sequence[Dimension]) -> list[Point]:
    """The points at which a format of fixed shapes gets a file: the example first, then every combination of ends.

    Of the batch, all numbers if they are few.
    """
    lengths = [
        range(one.low, one.high + 1) if one.name == BATCH_AXIS and one.high - one.low < _FEW else (one.low, one.high)
        for one in dimensions
    ]
    names = [one.name for one in dimensions]
    points = [dict(zip(names, some, strict=True)) for some in product(*lengths)]
    return _leave_out_doubles([find_example(dimensions), *points])


def _leave_out_doubles(points: Sequence[Point]) -> list[Point]:
    return list({describe_point(point): point for point in points}.values())


def find_example(dimensions: Iterable[Dimension]) -> Point:
    """The point with which a file is timed: one sample of the data's own shape."""
    return {one.name: one.low if one.example is None else one.example for one in dimensions}


def describe_point(point: Point) -> str:
    """A point in words: "batch 8, sequence 128"."""
    return ", ".join(f"{name} {length}" for name, length in point.items())


def find_rows(specs: Sequence[TensorSpec], point: Point) -> int:
    """The number of samples that an artifact with these inputs takes at once at a point."""
    side = specs[0].shape[0]
    return point.get(side.name, side.low) if isinstance(side, Dimension) else side


def count_rows(axes: Axes, point: Point) -> int:
    """The number of samples at once at a point, one where it does not vary."""
    return point[axes[0][0].name] if 0 in axes[0] else 1


def fit_samples(samples: Inputs, axes: Axes, point: Point, count: int) -> Inputs:
    """Make `count` samples with a point's lengths, by cutting samples or repeating them from their beginning."""
    return tuple(
        _fit(tensor, {0: count} | {axis: point[one.name] for axis, one in own.items() if axis})
        for tensor, own in zip(samples, axes, strict=True)
    )


def _fit(tensor: Tensor, lengths: Mapping[int, int]) -> Tensor:
    for axis, length in lengths.items():
        tensor = tensor.index_select(axis, torch.arange(length) % tensor.shape[axis])
    return tensor


def count_proof(rows: int) -> int:
    """The number of samples that prove a point: some, in whole batches."""
    return rows * max(1, _PROOF_SAMPLES // rows)


def describe_sides(name: str, seen: Sequence[Shape], points: Sequence[Point], dimensions: Sequence[Dimension]) -> Sides:
    """Describe the sides of one tensor from the shapes `seen` at `points`, the example's first.

    A side that varies as one of the dimensions does is that dimension, the first that no side before is; any other
    varying side is one of its own.
    """
    sides: list[int | Dimension] = []
    for axis, lengths in enumerate(zip(*seen, strict=True)):
        same = [
            one for one in dimensions if all(point[one.name] == n for point, n in zip(points, lengths, strict=True))
        ]
        if len(set(lengths)) == 1:
            sides.append(lengths[0])
        elif same:
            sides.append(next((one for one in same if one not in sides), same[0]))
        else:
            own = f"{name}.{axis}"
            sides.append(Dimension(name=own, low=min(lengths), high=max(lengths), example=lengths[0]))
    return tuple(sides)
