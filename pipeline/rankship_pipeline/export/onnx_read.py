"""Reads the integers and scales of weights of fewer bits from ONNX files."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from rankship_pipeline.export.rounded_weight import Array, Floats, RoundedWeight, unpack_nibbles
from rankship_pipeline.foundation.artifact_key import Precision

_PRECISIONS: dict[int, Precision] = {TensorProto.INT8: "int8", TensorProto.INT4: "int4"}
_FORWARD = {"Add", "Cast", "Mul", "Reshape", "Transpose"}  # what may stand between integers and their scales
_CONTRIB_PACKED = {"MatMulNBits", "GatherBlockQuantized"}


class _Graph:
    """A file's constants, and the nodes that read each tensor."""

    def __init__(self, path: Path) -> None:
        self.graph = onnx.load(path).graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.uses: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.uses[name].append(node)
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def read(self, name: str) -> Array:
        return numpy_helper.to_array(self.constants[name])


def read_weights(path: Path) -> tuple[RoundedWeight, ...]:
    """Every weight of 8 or 4 bits in a file: of DequantizeLinear, MatMulInteger, Gather, Cast and MatMulNBits."""
    graph = _Graph(path)
    found: dict[str, RoundedWeight] = {}
    for node in graph.graph.node:
        for one in _read_node(graph, node):
            found.setdefault(one.name, one)
    return tuple(found.values())


def _read_node(graph: _Graph, node: onnx.NodeProto) -> Iterator[RoundedWeight]:
    if node.op_type in _CONTRIB_PACKED:
        yield _read_packed(graph, node)
        return
    if not node.input or node.input[0] not in graph.constants:
        place = 1 if node.op_type == "MatMulInteger" and node.input[1] in graph.constants else None
    else:
        place = 0 if node.op_type in {"DequantizeLinear", "Gather", "Cast", "Transpose"} else None
    if place is None:
        return
    tensor = graph.constants[node.input[place]]
    precision = _PRECISIONS.get(tensor.data_type)
    if precision is None or len(tensor.dims) < 2:  # noqa: PLR2004 - biases and scales are vectors
        return
    if node.op_type == "DequantizeLinear":
        yield _read_dequantized(graph, node, precision)
        return
    integers = graph.read(tensor.name).astype(np.int8)
    scales = _follow_scales(graph, node)
    if scales is None:
        return
    if node.op_type == "MatMulInteger":
        integers = integers.T
    yield _arrange(tensor.name, precision, integers, scales)


def _arrange(name: str, precision: Precision, integers: Array, scales: Floats) -> RoundedWeight:
    rows = len(integers)
    return RoundedWeight(
        name=name,
        precision=precision,
        integers=integers.reshape(rows, -1),
        scales=scales.reshape(rows, -1).astype("f4"),
    )


def _follow_scales(graph: _Graph, node: onnx.NodeProto) -> Floats | None:
    """The first constant, or rows of a constant, that what a node makes is multiplied by."""
    waiting = list(node.output)
    seen = 0
    while waiting and seen < 12:  # noqa: PLR2004 - Transpose, MatMulInteger, Cast, Mul, Mul
        seen += 1
        for reader in graph.uses[waiting.pop(0)]:
            if reader.op_type == "Mul":
                for name in reader.input:
                    if (scales := _read_scales(graph, name)) is not None:
                        return scales
            if reader.op_type in _FORWARD | {"MatMulInteger"}:
                waiting.append(reader.output[0])
    return None


def _read_scales(graph: _Graph, name: str) -> Floats | None:
    maker = graph.makers.get(name)
    if maker is not None and maker.op_type == "Gather":
        name = maker.input[0]
    if name in graph.constants and graph.constants[name].data_type == TensorProto.FLOAT:
        scales: Floats = graph.read(name)
        return scales if scales.size > 1 or scales.ndim else None
    return None


def _read_dequantized(graph: _Graph, node: onnx.NodeProto, precision: Precision) -> RoundedWeight:
    attributes = {one.name: one.i for one in node.attribute}
    integers = graph.read(node.input[0]).astype(np.int8)
    scales: Floats = graph.read(node.input[1])
    axis = attributes.get("axis", 1) % integers.ndim
    if attributes.get("block_size", 0):  # the axis is the one that is divided
        if axis == 0:
            integers, scales = integers.T, scales.T
        return _arrange(node.input[0], precision, integers, scales)
    if scales.ndim == 0 or scales.size == 1:
        turned = any(reader.op_type == "MatMul" for reader in graph.uses[node.output[0]])
        axis = integers.ndim - 1 if turned else 0
        scales = np.broadcast_to(scales.reshape(-1), (integers.shape[axis],))
    return _arrange(node.input[0], precision, np.moveaxis(integers, axis, 0), scales)


def _read_packed(graph: _Graph, node: onnx.NodeProto) -> RoundedWeight:
    """Blocks of unsigned integers, whose zero is their middle."""
    attributes = {one.name: one.i for one in node.attribute}
    bits = attributes.get("bits", 4)
    product = node.op_type == "MatMulNBits"
    packed = graph.read(node.input[1 if product else 0])
    rows, columns = (attributes["N"], attributes["K"]) if product else (len(packed), packed.shape[1] * 8 // bits)
    flat = packed.reshape(rows, -1)
    unsigned = unpack_nibbles(flat, columns) if bits == 4 else flat[:, :columns].astype(np.int16)  # noqa: PLR2004
    integers = (unsigned - (1 << (bits - 1))).astype(np.int8)
    name = node.input[1 if product else 0]
    return _arrange(name, "int4" if bits == 4 else "int8", integers, graph.read(node.input[2]))  # noqa: PLR2004
