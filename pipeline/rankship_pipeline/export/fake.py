"""The shipped fake exporter: the graph's weighted operators as JSON, for fast tests of everything around exporting."""

import json
from math import prod
from pathlib import Path

from torch.export import ExportedProgram

from rankship_pipeline.export import Operator

_WEIGHTED = {"aten.linear.default", "aten.conv2d.default"}


def export_graph(graph: ExportedProgram, path: Path) -> None:
    """Write every linear and convolution node's weight shape."""
    shapes = {
        spec.arg.name: tuple(graph.state_dict[str(spec.target)].shape)
        for spec in graph.graph_signature.input_specs
        if spec.target in graph.state_dict
    }
    weights = [
        shapes[node.args[1].name]
        for node in graph.graph.nodes
        if node.op == "call_function" and str(node.target) in _WEIGHTED
    ]
    path.write_text(json.dumps(weights))


def list_operators(path: Path) -> tuple[Operator, ...]:
    """Read the shapes back."""
    return tuple(Operator(kind="fake", rows=rows, columns=prod(rest)) for rows, *rest in json.loads(path.read_text()))
