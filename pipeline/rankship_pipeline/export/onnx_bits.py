"""Weights of fewer bits in ONNX files: stores them in a float32 file, and reads them from any.

Only operators that onnxruntime runs well are written (benchmarks/baselines/capabilities.json holds the figures):

- a matrix product of int8 with dynamic activations: each row of activations is rounded with a step and a zero of its
  own, by standard operators around MatMulInteger. One step for all, as onnxruntime's quantiser has it, loses a
  transformer. A layer so narrow that rounding takes longer than it saves has its weights rounded alone
- a matrix product of int4 with dynamic activations: MatMulNBits, whose blocks of 32 are rounded as it computes
- weights alone: Cast and Mul, which onnxruntime computes once, when it loads the file
- rows of an embedding: they are looked up as integers, then multiplied by their scales
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rankship_pipeline.export.dynamic import LEAST, rounds_activations
from rankship_pipeline.export.rounded_weight import (
    Array,
    Floats,
    RoundedWeight,
    find_same,
    is_equal,
    list_stored,
    pack_nibbles,
)
from rankship_pipeline.recipe.precision import Activations

_CONTRIB = "com.microsoft"
_INT4_OPSET = 21  # the first with a type of 4 bits
_STEPS = 255  # of a row of activations


def quantise_file(
    source: Path, target: Path, weights: Sequence[RoundedWeight], activations: Activations
) -> tuple[RoundedWeight, ...]:
    """Write a float32 file with these weights in fewer bits, and list those that the file holds.

    A weight is found by its numbers. Others stay float32: an exporter may have made something else of them, as it does
    of an embedding that is looked up at constant places. `activations` is "dynamic" or "float32"; convolutions and
    embeddings have float32 activations with either.
    """
    model = onnx.load(source)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= dict(_turn_constants(graph, constants))
    nodes: list[onnx.NodeProto] = []
    added = _Added()
    stored: list[RoundedWeight] = []
    for node in graph.node:
        place = _find_place(node, constants)
        matrix = None if place is None else _read_matrix(node, place, constants)
        one = None if matrix is None else find_same(matrix, weights)
        if one is None or place is None:
            nodes.append(node)
            continue
        one = added.rename(one)
        stored.append(one)
        nodes += _choose(node, one, activations)(node, one, added)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    nodes = [node for node in nodes if node.op_type != "Transpose" or node.output[0] in used]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in (*graph.initializer, *added.tensors.values()) if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    _name_opsets(model, any(tensor.data_type == TensorProto.INT4 for tensor in kept))
    onnx.checker.check_model(model)
    target.write_bytes(model.SerializeToString())
    return list_stored(weights, stored)


class _Added:
    """New constants by name, each once, and the names of nodes that several others share."""

    def __init__(self) -> None:
        self.tensors: dict[str, onnx.TensorProto] = {}
        self._made: set[str] = set()
        self._weights: dict[str, RoundedWeight] = {}

    def is_first(self, name: str) -> bool:
        """Whether nobody asked for this name before."""
        first = name not in self._made
        self._made.add(name)
        return first

    def rename(self, one: RoundedWeight) -> RoundedWeight:
        """The weight, under a name of its own if another with other scales has its name."""
        name, number = one.name, 2
        while (other := self._weights.setdefault(name, one)) is not one and not is_equal(other, one):
            name, number = f"{one.name}_{number}", number + 1
        return one if name == one.name else replace(one, name=name)

    def add(self, name: str, array: Array | np.generic) -> str:
        self.tensors.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def add_shape(self, sides: list[int]) -> str:
        return self.add("shape_" + "_".join(str(side) for side in sides), np.array(sides, np.int64))

    def add_integers(self, one: RoundedWeight) -> str:
        """The integers as a tensor of their own type, (rows, columns)."""
        name = f"{one.name}_integers"
        if one.precision == "int8":
            return self.add(name, one.integers)
        tensor = TensorProto(name=name, data_type=TensorProto.INT4, dims=one.integers.shape)
        tensor.raw_data = pack_nibbles(one.integers.reshape(-1)).tobytes()
        self.tensors.setdefault(name, tensor)
        return name


def _turn_constants(
    graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto]
) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The matrices that a file turns before it multiplies by them: a head's that is tied to an embedding."""
    for node in graph.node:
        tensor = constants.get(node.input[0]) if node.op_type == "Transpose" else None
        if tensor is not None and len(tensor.dims) == 2:  # noqa: PLR2004 - of two axes there is one other order
            yield node.output[0], numpy_helper.from_array(numpy_helper.to_array(tensor).T)


def _find_place(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> int | None:
    """Which input of a node is its constant weight."""
    if node.op_type == "Gather":
        place = 0
    elif node.op_type in {"Conv", "Gemm", "MatMul"}:
        place = 1
    else:
        return None
    tensor = constants.get(node.input[place])
    return place if tensor is not None and tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 else None


def _read_matrix(node: onnx.NodeProto, place: int, constants: dict[str, onnx.TensorProto]) -> Floats:
    """The weight of a node, outputs first; an embedding's rows are its outputs."""
    array = numpy_helper.to_array(constants[node.input[place]])
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not _get(node, "transB", 0)):
        array = array.T
    return array.reshape(len(array), -1)


def _get(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(one.i) for one in node.attribute if one.name == name), default)


_Writer = Callable[[onnx.NodeProto, RoundedWeight, _Added], list[onnx.NodeProto]]


def _choose(node: onnx.NodeProto, one: RoundedWeight, activations: Activations) -> _Writer:
    if node.op_type == "Gather":
        return _look_up if one.precision == "int8" else _look_up_blocks
    plain = activations == "float32" or node.op_type == "Conv" or _get(node, "transA", 0)
    if plain or not rounds_activations(one, "onnx"):
        return _multiply_floats
    return _multiply_integers if one.precision == "int8" else _multiply_blocks


def _multiply_floats(node: onnx.NodeProto, one: RoundedWeight, added: _Added) -> list[onnx.NodeProto]:
    """The weight is made float32 by nodes that read constants only: onnxruntime folds them as it loads."""
    name, (rows, columns) = one.name, one.integers.shape
    inner = [rows, one.scales.shape[1], one.block]
    outer = [rows, -1, *_list_sides(node)] if node.op_type == "Conv" else [rows, columns]
    last, turned = f"{name}_float", node.op_type == "MatMul" or not _get(node, "transB", 0)
    nodes, scales = [], added.add(f"{name}_block_scales", one.scales[:, :, None])
    if added.is_first(last):
        nodes = [
            helper.make_node("Cast", [added.add_integers(one)], [f"{name}_cast"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", [f"{name}_cast", added.add_shape(inner)], [f"{name}_blocks"]),
            helper.make_node("Mul", [f"{name}_blocks", scales], [f"{name}_scaled"]),
            helper.make_node("Reshape", [f"{name}_scaled", added.add_shape(outer)], [last]),
        ]  # fmt: skip
    if node.op_type != "Conv" and turned:
        if added.is_first(f"{last}_turned"):
            nodes.append(helper.make_node("Transpose", [last], [f"{last}_turned"], perm=[1, 0]))
        last = f"{last}_turned"
    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    changed.input[1] = last
    return [*nodes, changed]


def _list_sides(node: onnx.NodeProto) -> list[int]:
    return next(list(one.ints) for one in node.attribute if one.name == "kernel_shape")


def _multiply_integers(node: onnx.NodeProto, one: RoundedWeight, added: _Added) -> list[onnx.NodeProto]:
    """Rows of activations become 256 steps from their least to their largest number, with 0 among them, as uint8.

    Steps from 0 are (q − z)·s, so that z times the sum of each column of integers is taken from the product.
    onnxruntime turns the integers as it loads them, so that a tied embedding and head can share theirs.
    """
    name, x, key = one.name, node.input[0], node.output[0]
    axis, zero = added.add("rounded_axis", np.array([-1], np.int64)), added.add("rounded_zero", np.float32(0))
    step, least = added.add("rounded_step", np.float32(1 / _STEPS)), added.add("rounded_least", np.float32(LEAST))
    top = added.add("rounded_top", np.float32(_STEPS))
    turned = f"{name}_turned"
    nodes = []
    if added.is_first(turned):
        nodes = [helper.make_node("Transpose", [added.add_integers(one)], [turned], perm=[1, 0])]
    sums = added.add(f"{name}_sums", one.integers.sum(1, dtype=np.int32).astype(np.float32))
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("ReduceMin", [x, axis], "min", {"keepdims": 1}),
        ("ReduceMax", [x, axis], "max", {"keepdims": 1}),
        ("Min", [f"{key}_min", zero], "low", {}),
        ("Max", [f"{key}_max", zero], "high", {}),
        ("Sub", [f"{key}_high", f"{key}_low"], "range", {}),
        ("Mul", [f"{key}_range", step], "even", {}),
        ("Max", [f"{key}_even", least], "scale", {}),
        ("Div", [f"{key}_low", f"{key}_scale"], "lowest", {}),
        ("Round", [f"{key}_lowest"], "zero", {}),  # −z
        ("Div", [x, f"{key}_scale"], "divided", {}),
        ("Round", [f"{key}_divided"], "rounded", {}),
        ("Sub", [f"{key}_rounded", f"{key}_zero"], "shifted", {}),
        ("Clip", [f"{key}_shifted", zero, top], "clipped", {}),
        ("Cast", [f"{key}_clipped"], "bytes", {"to": TensorProto.UINT8}),
        ("MatMulInteger", [f"{key}_bytes", turned], "whole", {}),
        ("Cast", [f"{key}_whole"], "floats", {"to": TensorProto.FLOAT}),
        ("Mul", [f"{key}_zero", sums], "offset", {}),
        ("Add", [f"{key}_floats", f"{key}_offset"], "centred", {}),
        ("Mul", [f"{key}_centred", f"{key}_scale"], "scaled", {}),
        ("Mul", [f"{key}_scaled", added.add(f"{name}_scales", one.scales[:, 0])], "product", {}),
    ]
    nodes += [helper.make_node(kind, read, [f"{key}_{made}"], **more) for kind, read, made, more in steps]
    return _finish(nodes, node)


def _multiply_blocks(node: onnx.NodeProto, one: RoundedWeight, added: _Added) -> list[onnx.NodeProto]:
    rows, columns = one.integers.shape
    packed = pack_nibbles((one.integers.astype(np.int16) + 8).reshape(rows, -1, one.block))
    scales = added.add(f"{one.name}_flat_scales", one.scales.reshape(-1))
    made = helper.make_node(
        "MatMulNBits",
        [node.input[0], added.add(f"{one.name}_packed", packed), scales],
        [f"{node.output[0]}_product"],
        domain=_CONTRIB, K=columns, N=rows, bits=4, block_size=one.block, accuracy_level=4,
    )  # fmt: skip
    return _finish([made], node)


def _finish(nodes: list[onnx.NodeProto], node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Give the last node the replaced one's output, after its bias."""
    if node.op_type == "Gemm" and len(node.input) > 2:  # noqa: PLR2004 - x, W, bias
        nodes.append(helper.make_node("Add", [nodes[-1].output[0], node.input[2]], [node.output[0]]))
    else:
        nodes[-1].output[0] = node.output[0]
    return nodes


def _look_up(node: onnx.NodeProto, one: RoundedWeight, added: _Added) -> list[onnx.NodeProto]:
    key, places = node.output[0], node.input[1]
    return [
        helper.make_node("Gather", [added.add_integers(one), places], [f"{key}_bytes"]),
        helper.make_node("Cast", [f"{key}_bytes"], [f"{key}_floats"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [added.add(f"{one.name}_row_scales", one.scales), places], [f"{key}_scale"]),
        helper.make_node("Mul", [f"{key}_floats", f"{key}_scale"], [key]),
    ]


def _look_up_blocks(node: onnx.NodeProto, one: RoundedWeight, added: _Added) -> list[onnx.NodeProto]:
    packed = pack_nibbles(one.integers.astype(np.int16) + 8)
    made = helper.make_node(
        "GatherBlockQuantized",
        [added.add(f"{one.name}_packed_rows", packed), node.input[1], added.add(f"{one.name}_row_scales", one.scales)],
        [node.output[0]],
        domain=_CONTRIB, bits=4, block_size=one.block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    return [made]


def _name_opsets(model: onnx.ModelProto, has_int4: bool) -> None:  # noqa: FBT001 - one caller
    domains = {one.domain: one for one in model.opset_import}
    if any(node.domain == _CONTRIB for node in model.graph.node) and _CONTRIB not in domains:
        model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    if has_int4:
        domains[""].version = max(domains[""].version, _INT4_OPSET)
