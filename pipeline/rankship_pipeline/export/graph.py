"""Traces a model with torch.export, and lists the graph's operators with constant weights."""

import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rankship_pipeline.export import Operator
from rankship_pipeline.export.guards import Guards, watch_guards
from rankship_pipeline.export.shapes import Axes, count_rows, fit_samples, list_dimensions
from rankship_pipeline.foundation.errors import UnsupportedOp
from rankship_pipeline.foundation.records import Dimension
from rankship_pipeline.models.outputs import flatten

_WEIGHTED = {"aten.linear.default", "aten.conv2d.default", "aten.conv2d.padding"}
_LEAST = 2  # torch.export takes a length of 1 for a constant


def list_graph_operators(graph: ExportedProgram) -> tuple[Operator, ...]:
    """Every linear and convolution node; a module that is called twice counts twice."""
    shapes = {
        spec.arg.name: tuple(graph.state_dict[str(spec.target)].shape)
        for spec in graph.graph_signature.input_specs
        if spec.target in graph.state_dict
    }
    found = []
    for node in graph.graph.nodes:
        if node.op == "call_function" and str(node.target) in _WEIGHTED and str(node.args[1]) in shapes:
            rows, *rest = shapes[str(node.args[1])]
            found.append(Operator(kind=str(node.target), rows=rows, columns=prod(rest)))
    return tuple(found)


def trace_graph(module: nn.Module, example: tuple[Tensor, ...], outputs: Sequence[str] = ()) -> ExportedProgram:
    """The graph from which all formats are exported, of the example's shape.

    With `outputs` it gives the tensors of these names, in their order, and nothing else of what the module returns.
    """
    try:
        with _returning(module, outputs):
            return torch.export.export(module, example)
    except Exception as failure:  # the model's code and the tracer raise errors of any type
        raise UnsupportedOp(
            f"torch.export cannot trace the model: {type(failure).__name__}: {failure}",
            hint="remove data-dependent control flow from its forward",
        ) from failure


def trace_ranges(
    module: nn.Module, samples: tuple[Tensor, ...], axes: Axes, outputs: Sequence[str] = ()
) -> ExportedProgram:
    """The graph that takes every length in the ranges of `axes`; UnsupportedOp names an axis that the model fixes."""
    dimensions = list_dimensions(one for own in axes for one in own.values())
    lengths = {one.name: max(_LEAST, one.example or one.low) for one in dimensions}
    example = fit_samples(samples, axes, lengths, count_rows(axes, lengths))
    known = {one.name: Dim(re.sub(r"\W", "_", one.name), min=one.low, max=one.high) for one in dimensions}
    marked = [{axis: known[one.name] for axis, one in own.items()} for own in axes]
    with watch_guards() as guards:
        try:
            shapes = inspect.signature(module.forward).bind(*marked).arguments
            with _returning(module, outputs):
                return torch.export.export(module, example, dynamic_shapes=shapes)
        except Exception as failure:  # as above
            raise _explain(failure, dimensions, guards) from failure


def _explain(failure: Exception, dimensions: tuple[Dimension, ...], guards: Guards) -> UnsupportedOp:
    """The axes that the model's code does not let vary, and the line of code that fixes them."""
    asked = {re.sub(r"\W", "_", one.name): f"{one.name} {one.low} to {one.high}" for one in dimensions}
    violated = re.search(r"Constraints violated \(([^)]*)\)", str(failure))
    names = [name.strip() for name in violated.group(1).split(",")] if violated else list(asked)
    ranges = " and ".join(asked.get(name, name) for name in names)
    fixes = re.findall(r"^  (_?\w+ = .*)$", str(failure), re.MULTILINE)
    if violated and fixes:
        cause = "the model's code takes only " + ", ".join(fixes)
    else:
        cause = f"{type(failure).__name__}: {failure}"
    where = f", which it decides at {guards.place}" if guards.place else ""
    return UnsupportedOp(
        f"torch.export cannot let the model's inputs vary in {ranges}: {cause}{where}",
        hint="make its code read lengths from its inputs (x.shape[1], not a number), or name a narrower range, or leave"
        " it out of [export]",
    )


@contextmanager
def _returning(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Make the module return a tuple of these outputs meanwhile; its parameters keep their names, so no wrapper."""
    if not names:
        yield
        return
    whole = module.forward

    @functools.wraps(whole)
    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = flatten(whole(*inputs))
        return tuple(found[name] for name in names)

    module.forward = forward  # of this instance alone
    try:
        yield
    finally:
        del module.forward
