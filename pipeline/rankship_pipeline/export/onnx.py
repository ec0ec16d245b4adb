"""Exports to ONNX with torch's own exporter."""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnx
import onnx.shape_inference
import onnx.utils
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.export import ExportedProgram

from rankship_pipeline.export import Operator, check_size
from rankship_pipeline.export.eight_bits import fold_weights, has_bits
from rankship_pipeline.export.onnx_unsigned import use_unsigned
from rankship_pipeline.export.shapes import Axes
from rankship_pipeline.foundation.errors import UnsupportedOp

# The newest opset that every onnxruntime since 1.17 loads; torch's exporter writes IR 10 with it.
OPSET = 20
_WEIGHTED = {"Conv", "Gemm", "MatMul", "MatMulInteger"}
_ROUNDED = "MatMulNBits"  # the sides of its packed weight are attributes
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_DIMENSIONS = 4  # of queries, keys and values in torch's exporter: (samples, heads, positions, width)


def export_graph(graph: ExportedProgram, path: Path, axes: Axes = ()) -> None:
    """Write one checked file with its weights inside, without the stack traces that the exporter adds."""
    rounded, graph = has_bits(graph), fold_weights(graph)
    check_size(graph.state_dict.values(), "onnx")
    try:
        program = torch.onnx.export(lift_attention(graph), dynamo=True, opset_version=OPSET, verbose=False)
    except Exception as failure:  # a converter's passes raise errors of any type
        raise UnsupportedOp(
            f"ONNX cannot express the model: {type(failure).__name__}: {failure}", hint="see the operator named above"
        ) from failure
    if program is None:
        raise UnsupportedOp("torch.onnx.export returned no program")
    if axes:
        program.rename_axes(dict(_name_symbols(program, axes)))
    model = program.model_proto
    strip_metadata(model)
    if rounded:
        use_unsigned(model)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def lift_attention(graph: ExportedProgram) -> ExportedProgram:
    """The graph with leading dimensions of one where attention has fewer than four: the exporter refuses fewer."""
    nodes = [node for node in graph.graph.nodes if node.target is _ATTENTION]
    if all(node.args[0].meta["val"].ndim >= _DIMENSIONS for node in nodes):
        return graph
    lifted: ExportedProgram = graph.run_decompositions({_ATTENTION: _attend_lifted})
    return lifted


def _attend_lifted(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:  # noqa: ANN401 - ATen's own
    if q.ndim >= _DIMENSIONS:
        return NotImplemented  # type: ignore[no-any-return]  # the node stays as it is
    lead = (None,) * (_DIMENSIONS - q.ndim)
    y: Tensor = _ATTENTION(q[lead], k[lead], v[lead], *rest, **named)
    return y.squeeze(tuple(range(len(lead))))


def _name_symbols(program: torch.onnx.ONNXProgram, axes: Axes) -> Iterator[tuple[str, str]]:
    """The exporter's symbols for lengths, each with the axis's own name."""
    for value, own in zip(program.model.graph.inputs, axes, strict=True):
        if value.shape is not None:
            yield from ((str(value.shape[axis]), one.name) for axis, one in own.items())


def split_outputs(path: Path, targets: Sequence[Path]) -> None:
    """Split a file with one input and several outputs into one file per output, with only the nodes it needs."""
    model = onnx.load(path)
    extractor = onnx.utils.Extractor(model)
    for output, target in zip(model.graph.output, targets, strict=True):
        part = extractor.extract_model([model.graph.input[0].name], [output.name])
        onnx.checker.check_model(part, full_check=True)
        target.write_bytes(part.SerializeToString())


def strip_metadata(model: onnx.ModelProto) -> None:
    """Remove stack traces from metadata_props: they enlarge the file and contain paths of the build host."""
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for holder in (model.graph, *model.graph.value_info, *model.graph.input, *model.graph.output):
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")
    for initializer in model.graph.initializer:
        initializer.ClearField("metadata_props")
        initializer.ClearField("doc_string")
    model.ClearField("metadata_props")


def list_operators(path: Path) -> tuple[Operator, ...]:
    """Convolutions and matrix products with a constant weight, also one that the file computes from constants."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = _find_constants(graph)
    found = []
    for node in graph.node:
        if node.op_type == _ROUNDED:
            sides = {one.name: one.i for one in node.attribute}
            found.append(Operator(kind=node.op_type, rows=sides["N"], columns=sides["K"]))
        if node.op_type not in _WEIGHTED:
            continue
        # x·W has its outputs last in W; a convolution, W·x and a transposed W have them first
        place = 1 if node.input[1] in shapes else 0
        shape = shapes.get(node.input[place], ())
        if len(shape) < 2:  # noqa: PLR2004 - a vector is no matrix
            continue
        turned = any(one.name == ("transA", "transB")[place] and one.i for one in node.attribute)
        first = node.op_type == "Conv" or (place == 1) == turned
        rows = shape[0] if first else shape[-1]
        found.append(Operator(kind=node.op_type, rows=rows, columns=prod(shape) // rows))
    return tuple(found)


def _find_constants(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """The shapes of initialisers and of all that is computed from them alone."""
    known = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            shapes[node.output[0]] = numpy_helper.to_array(node.attribute[0].t).shape
        elif node.input and all(name in shapes or not name for name in node.input):
            shapes |= {name: tuple(side.dim_value for side in known.get(name, ())) for name in node.output}
    return shapes
