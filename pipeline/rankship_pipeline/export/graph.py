"""The torch.export graph itself, read as the exported files are: its operators with constant weights."""

from math import prod

from torch.export import ExportedProgram

from rankship_pipeline.export import Operator

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
