"""Traces a model with torch.export, and lists the graph's operators with constant weights."""

import copy
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from rankship_pipeline.export import Expected, Operator
from rankship_pipeline.export.collector import pause_collector
from rankship_pipeline.export.frozen_trace import trace_frozen
from rankship_pipeline.export.guards import Guards, watch_guards
from rankship_pipeline.export.reach import find_reach
from rankship_pipeline.export.shapes import Axes, count_rows, fit_samples, list_dimensions
from rankship_pipeline.foundation.errors import UnsupportedOp
from rankship_pipeline.foundation.records import Dimension
from rankship_pipeline.models.outputs import flatten

_LEAST = 2  # torch.export takes a length of 1 for a constant
# Operators of ATen's core with a weight: the places of their factors, W·x before x·W.
_FACTORS = {
    "aten.convolution.default": (1,),
    "aten.mm.default": (0, 1),
    "aten.bmm.default": (0, 1),
    "aten.addmm.default": (1, 2),
}
_TRANSPOSED = 6  # the place of a convolution's flag
_VIEWS = {
    "aten.alias.default", "aten.clone.default", "aten.expand.default", "aten.permute.default", "aten.squeeze.dims",
    "aten.unsqueeze.default", "aten.view.default",
}  # fmt: skip
# Formats have operators of their own for these, which hold all their weights.
_RECURRENT = {"aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input"}


def expect_operators(graph: ExportedProgram) -> Expected:
    """The matrix products and convolutions with a constant weight that a file of the graph must and may hold.

    What does not vary with the inputs, or reaches no output, need not be in the file, nor a computation twice; a module
    that is called twice on different inputs counts twice. A weight that is computed from parameters may be computed in
    the file too, and a recurrent network may be one operator: neither has to be there.
    """
    recurrent = {node.name for node in graph.graph.nodes if str(node.target) in _RECURRENT}
    with pause_collector():
        lowered = graph.run_decompositions()
    reach = find_reach(lowered)
    needed, allowed = list[Operator](), list[Operator]()
    for node in lowered.graph.nodes:
        for weight, operator in _find_weight(node, reach.varying):
            allowed.append(operator)
            unrolled = any(one.name in recurrent for one in node.meta.get("from_node", ()))
            if reach.is_kept(node) and _is_stored(weight) and not unrolled:
                needed.append(operator)
    return Expected(needed=tuple(needed), allowed=tuple(allowed))


def _find_weight(node: Node, varying: frozenset[Node]) -> Iterator[tuple[Node, Operator]]:
    """The constant weight of a node that multiplies by one, and the node as an operator; both if both are constant."""
    name = str(node.target)
    if name == "aten.convolution.default" and node.args[_TRANSPOSED]:
        return  # formats keep its weight in orders of their own; it is not looked for
    for at, place in enumerate(_FACTORS.get(name, ())):
        weight = node.args[place]
        if isinstance(weight, Node) and weight not in varying:
            shape = tuple(int(side) for side in weight.meta["val"].shape)
            first = 0 if name == "aten.convolution.default" else -2  # a batched product's matrix is its last two
            rows = shape[first if at == 0 else -1]
            yield weight, Operator(kind=name, rows=rows, columns=prod(shape) // rows)


def _is_stored(weight: Node) -> bool:
    """Whether a weight is a tensor of the model, perhaps seen in another order."""
    while str(weight.target) in _VIEWS:
        (weight,) = weight.all_input_nodes
    return weight.op == "placeholder"


def trace_graph(module: nn.Module, example: tuple[Tensor, ...], outputs: Sequence[str] = ()) -> ExportedProgram:
    """The graph from which all formats are exported, of the example's shape, with every tensor in row-major order.

    With `outputs` it gives the tensors of these names, in their order, and nothing else of what the module returns.
    """
    ordered = order_rows(module)
    try:
        with _returning(ordered, outputs):
            return trace_frozen(ordered, tuple(map(lay_out, example)))
    except Exception as failure:  # the model's code and the tracer raise errors of any type
        raise UnsupportedOp(
            f"torch.export cannot trace the model: {type(failure).__name__}: {failure}",
            hint="remove data-dependent control flow from its forward",
        ) from failure


def order_rows(module: nn.Module) -> nn.Module:
    """The module with all its tensors in row-major order, a copy unless they are so already.

    LiteRT's converter takes two transposed weights of one shape for each other, and ExecuTorch's portable operators
    refuse channels_last.
    """
    if all(lay_out(tensor) is tensor for one in module.modules() for _, tensor in _list_tensors(one)):
        return module
    ordered = copy.deepcopy(module)
    for one in ordered.modules():
        for name, tensor in _list_tensors(one):
            if isinstance(tensor, nn.Parameter) or name in one._buffers:  # noqa: SLF001 - parameters() hides its owner
                tensor.data = lay_out(tensor.data)
            else:
                setattr(one, name, lay_out(tensor))
    return ordered


def lay_out(tensor: Tensor) -> Tensor:
    """The tensor with the strides of row-major order, itself if it has them.

    torch calls a channels_last image of one channel contiguous, though its strides are not these: ExecuTorch writes a
    program that does not run.
    """
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _list_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own parameters, buffers, and tensors that are plain attributes, by name."""
    owned = {**module._parameters, **module._buffers, **vars(module)}  # noqa: SLF001
    return [
        (name, value) for name, value in owned.items() if isinstance(value, Tensor) and value.layout == torch.strided
    ]


def trace_ranges(
    module: nn.Module, samples: tuple[Tensor, ...], axes: Axes, outputs: Sequence[str] = ()
) -> ExportedProgram:
    """The graph that takes every length in the ranges of `axes`; UnsupportedOp names an axis that the model fixes."""
    dimensions = list_dimensions(one for own in axes for one in own.values())
    lengths = {one.name: max(_LEAST, one.example or one.low) for one in dimensions}
    example = fit_samples(samples, axes, lengths, count_rows(axes, lengths))
    known = {one.name: Dim(re.sub(r"\W", "_", one.name), min=one.low, max=one.high) for one in dimensions}
    marked = [{axis: known[one.name] for axis, one in own.items()} for own in axes]
    ordered = order_rows(module)
    with watch_guards() as guards:
        try:
            shapes = inspect.signature(module.forward).bind(*marked).arguments
            with _returning(ordered, outputs):
                return trace_frozen(ordered, tuple(map(lay_out, example)), shapes)
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
