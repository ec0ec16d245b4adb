"""Traces a model with torch.export, and lists the graph's operators with constant weights."""

import copy
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from rankship_pipeline.export import Expected, Operator
from rankship_pipeline.export.frozen_trace import trace_frozen
from rankship_pipeline.export.reach import find_reach
from rankship_pipeline.foundation.errors import UnsupportedOp

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
            rows = shape[0 if at == 0 else -1]
            yield weight, Operator(kind=name, rows=rows, columns=prod(shape) // rows)


def _is_stored(weight: Node) -> bool:
    """Whether a weight is a tensor of the model, perhaps seen in another order."""
    while str(weight.target) in _VIEWS:
        (weight,) = weight.all_input_nodes
    return weight.op == "placeholder"


def trace_graph(module: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    """The graph from which all formats are exported, at batch size 1, with every tensor in row-major order."""
    try:
        return trace_frozen(order_rows(module), tuple(tensor.contiguous() for tensor in example))
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
    if all(tensor.is_contiguous() for one in module.modules() for _, tensor in _list_tensors(one)):
        return module
    ordered = copy.deepcopy(module)
    for one in ordered.modules():
        for name, tensor in _list_tensors(one):
            if isinstance(tensor, nn.Parameter) or name in one._buffers:  # noqa: SLF001 - parameters() hides its owner
                tensor.data = tensor.data.contiguous()
            else:
                setattr(one, name, tensor.contiguous())
    return ordered


def _list_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own parameters, buffers, and tensors that are plain attributes, by name."""
    owned = {**module._parameters, **module._buffers, **vars(module)}  # noqa: SLF001
    return [
        (name, value) for name, value in owned.items() if isinstance(value, Tensor) and value.layout == torch.strided
    ]
