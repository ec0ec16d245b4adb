"""Traces a model with torch.export, and lists the graph's operators with constant weights."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rankship_pipeline.export import Operator
from rankship_pipeline.foundation.errors import UnsupportedOp
from rankship_pipeline.models.outputs import flatten

_WEIGHTED = {"aten.linear.default", "aten.conv2d.default", "aten.conv2d.padding"}


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
    """The graph from which all formats are exported, at batch size 1.

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
