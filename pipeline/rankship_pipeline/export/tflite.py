"""Exports to TFLite with LiteRT's converter, without TensorFlow."""

from math import prod
from pathlib import Path

import litert_torch
import torch
from ai_edge_litert.interpreter import Interpreter
from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
from litert_torch.quantize.quant_config import QuantConfig
from torch.export import ExportedProgram

from rankship_pipeline.export import Operator, check_size
from rankship_pipeline.export.eight_bits import has_bits
from rankship_pipeline.export.shapes import Axes
from rankship_pipeline.export.tflite_borders import restore_borders
from rankship_pipeline.foundation.errors import UnsupportedOp

# Operators with a weight, and the axis of the weight that holds its outputs: OHWI, 1HWO, (out, in), (in, out).
_OUTPUTS_AT = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": -1, "FULLY_CONNECTED": 0, "BATCH_MATMUL": -1}


def export_graph(graph: ExportedProgram, path: Path, _axes: Axes = ()) -> None:
    """Write one flatbuffer; inputs are named args_0, args_1, …, keep torch's layout, and int64 becomes int32."""
    check_size(graph.state_dict.values(), "tflite")
    rounded = has_bits(graph)
    settings = {"quant_config": _keep_ranges()} if rounded else {}
    try:
        litert_torch.convert(graph.module(check_guards=False), _example_inputs(graph), **settings).export(str(path))
    except Exception as failure:  # a converter's passes raise errors of any type
        raise UnsupportedOp(
            f"TFLite cannot express the model: {type(failure).__name__}: {failure}", hint="see the operator named above"
        ) from failure
    if rounded:
        restore_borders(path)


def _keep_ranges() -> QuantConfig:
    """The setting by which the converter takes the graph's own ranges and integers for its 8-bit operators."""
    return QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config()))


def _example_inputs(graph: ExportedProgram) -> tuple[torch.Tensor, ...]:
    if graph.example_inputs is None:
        raise UnsupportedOp("the exported graph carries no example inputs")
    return tuple(graph.example_inputs[0])


def list_operators(path: Path) -> tuple[Operator, ...]:
    """Every convolution and matrix product with a constant weight."""
    interpreter = Interpreter(model_path=str(path))
    shapes = {
        detail["index"]: tuple(int(side) for side in detail["shape"]) for detail in interpreter.get_tensor_details()
    }
    operators = interpreter._get_ops_details()  # noqa: SLF001 - the interpreter offers no public list
    computed = {int(one["index"]) for one in interpreter.get_input_details()}
    for operator in operators:  # in the order of their running
        if operator["op_name"] != "DEQUANTIZE" or int(operator["inputs"][0]) in computed:
            computed |= {int(one) for one in operator["outputs"]}
    found = []
    for operator in operators:
        kind, read = operator["op_name"], [int(one) for one in operator["inputs"]]
        if (
            kind in _OUTPUTS_AT
            and (place := next((one for one in (1, 0) if read[one] not in computed), None)) is not None
        ):
            # a constant that is multiplied from the left, W·x, has its outputs before its inputs
            shape = shapes[read[place]]
            rows = shape[_OUTPUTS_AT[kind] if place == 1 else -2]
            found.append(Operator(kind=kind, rows=rows, columns=prod(shape) // rows))
    return tuple(found)
