"""Writes a quantised ONNX graph in the form that ONNX Runtime computes in integers on every processor.

Its fast kernels for x86 take unsigned activations and signed weights. It moves signed ones to unsigned ones by itself,
but not where a tensor is read twice, and then computes these layers in float32; nor does it fuse an addition with the
rounding behind it while a ReLU stands between them.
"""

import numpy as np
import onnx
from onnx import numpy_helper

_SHIFT = 128  # between int8 and uint8


def use_unsigned(model: onnx.ModelProto) -> None:
    """Change all rounded activations from int8 to uint8, and drop each ReLU that rounding does anyway.

    Every number stays the same: q + 128 with a zero point that is 128 higher. Of a ReLU's input, what is below zero is
    rounded to the lowest integer where that one stands for zero.
    """
    graph = model.graph
    constants = {one.name: one for one in graph.initializer}
    moved: dict[str, str] = {}
    rounded = []
    for node in graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"} and node.input[0] not in constants:
            zero = numpy_helper.to_array(constants[node.input[2]])
            if zero.dtype != np.int8:
                continue
            if node.input[2] not in moved:
                moved[node.input[2]] = name = f"{node.input[2]}_unsigned"
                shifted = (zero.astype(np.int16) + _SHIFT).astype(np.uint8)
                graph.initializer.append(numpy_helper.from_array(shifted, name))
            node.input[2] = moved[node.input[2]]
            rounded += [node.output[0]] if node.op_type == "QuantizeLinear" else []
    for value in graph.value_info:
        if value.name in rounded:
            value.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    _drop_relus(graph)
    read = {name for node in graph.node for name in node.input}
    for one in [one for one in graph.initializer if one.name not in read]:
        graph.initializer.remove(one)


def _drop_relus(graph: onnx.GraphProto) -> None:
    constants = {one.name: one for one in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def starts_at_zero(node: onnx.NodeProto) -> bool:
        return node.op_type == "QuantizeLinear" and not numpy_helper.to_array(constants[node.input[2]]).any()

    outputs = {one.name for one in graph.output}
    for relu in [node for node in graph.node if node.op_type == "Relu" and node.output[0] not in outputs]:
        behind = readers.get(relu.output[0], [])
        if behind and all(map(starts_at_zero, behind)):
            for node in behind:
                node.input[0] = relu.input[0]
            graph.node.remove(relu)
