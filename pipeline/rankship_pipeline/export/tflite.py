"""Exports to TFLite with LiteRT's converter, without TensorFlow."""

from math import prod
from pathlib import Path

import litert_torch
import torch
from ai_edge_litert.interpreter import Interpreter
from torch.export import ExportedProgram

from rankship_pipeline.export import Operator
from rankship_pipeline.export.shapes import Axes
from rankship_pipeline.foundation.errors import UnsupportedOp

_WEIGHTED = {"CONV_2D", "FULLY_CONNECTED"}


def export_graph(graph: ExportedProgram, path: Path, _axes: Axes = ()) -> None:
    """Write one flatbuffer; inputs are named args_0, args_1, …, keep torch's layout, and int64 becomes int32."""
    try:
        litert_torch.convert(graph.module(), _example_inputs(graph)).export(str(path))
    except Exception as failure:  # a converter's passes raise errors of any type
        raise UnsupportedOp(
            f"TFLite cannot express the model: {type(failure).__name__}: {failure}", hint="see the operator named above"
        ) from failure


def _example_inputs(graph: ExportedProgram) -> tuple[torch.Tensor, ...]:
    if graph.example_inputs is None:
        raise UnsupportedOp("the exported graph carries no example inputs")
    return tuple(graph.example_inputs[0])


def list_operators(path: Path) -> tuple[Operator, ...]:
    """CONV_2D (OHWI) and FULLY_CONNECTED (out, in) operators; their second tensor is the weight."""
    interpreter = Interpreter(model_path=str(path))
    shapes = {
        detail["index"]: tuple(int(side) for side in detail["shape"]) for detail in interpreter.get_tensor_details()
    }
    found = []
    for operator in interpreter._get_ops_details():  # noqa: SLF001 - the interpreter offers no public list
        if operator["op_name"] in _WEIGHTED:
            rows, *rest = shapes[int(operator["inputs"][1])]
            found.append(Operator(kind=operator["op_name"], rows=rows, columns=prod(rest)))
    return tuple(found)
