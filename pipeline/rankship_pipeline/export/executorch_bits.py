"""Weights of fewer bits in ExecuTorch files: puts them into a module to be exported, and reads them from any file.

XNNPACK runs linear layers of int8 and int4 weights with activations that are rounded row by row. torchao's tensor
holds the integers and scales as they are, and computes in torch what XNNPACK computes: a module with them is its own
reference. ExecuTorch has no kernel of rounded embeddings in every runtime, so an embedding looks its integers up and
multiplies them by their scales, with operators that every runtime has.
"""

import copy
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import KernelCall
from numpy.typing import NDArray
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8TensorActivationQuantization,
)

from rankship_pipeline.export.executorch import read_delegates
from rankship_pipeline.export.rounded_weight import RoundedWeight, unpack_nibbles
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.models.layers import find_kind, is_conv1d_of_transformers

_BY_ROW = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN


class RoundedEmbedding(nn.Module):
    """An embedding whose rows are stored as integers; of 4 bits, the halves of a row share bytes.

    `factor` is what it multiplies rows by, as Gemma's does.
    """

    factor: Tensor | None

    def __init__(self, one: RoundedWeight, factor: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("factor", factor, persistent=False)
        integers = torch.from_numpy(one.integers)
        self.blocks = one.scales.shape[1]
        self.packed = one.precision == "int4"
        if self.packed:
            low, high = integers.chunk(2, 1)
            integers = (low + 8 + 16 * (high.to(torch.int16) + 8)).to(torch.uint8)
        self.register_buffer("integers", integers)
        self.register_buffer("scales", torch.from_numpy(one.scales.copy()))

    def forward(self, places: Tensor) -> Tensor:
        """The rows at these places, float32."""
        numbers = nn.functional.embedding(places, self.integers).float()  # type: ignore[arg-type]
        if self.packed:
            high = torch.floor(numbers / 16)
            numbers = torch.cat([numbers - 16 * high, high], -1) - 8
        scales = nn.functional.embedding(places, self.scales)  # type: ignore[arg-type]
        blocks = numbers.reshape(*numbers.shape[:-1], self.blocks, -1)
        rows = numbers * scales if self.blocks == 1 else (blocks * scales[..., None]).flatten(-2)
        return rows if self.factor is None else rows * self.factor


def quantise_module(module: nn.Module, weights: Sequence[RoundedWeight]) -> nn.Module:
    """A copy of a module whose linear layers and embeddings of these names hold rounded weights.

    What it computes is what the exported file computes, so that it is the reference of the file's proof. Others stay
    float32; BuildError names what is no linear layer and no embedding.
    """
    changed = copy.deepcopy(module)
    for one in weights:
        layer = changed.get_submodule(one.name)
        if isinstance(layer, nn.Embedding):
            _replace(changed, one.name, RoundedEmbedding(one, getattr(layer, "embed_scale", None)))
        elif find_kind(layer) == "linear":
            if is_conv1d_of_transformers(layer):  # its weight is the other way round
                _replace(changed, one.name, nn.Linear(one.integers.shape[1], len(one.integers)))
                changed.get_submodule(one.name).bias = layer.bias
            changed.get_submodule(one.name).weight = nn.Parameter(_round_weight(one), requires_grad=False)
        else:
            raise BuildError(
                f"{one.name}: ExecuTorch has no {type(layer).__name__} with dynamic activations",
                hint="leave it float32, or choose static activations",
            )
    return changed


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, child)


def _round_weight(one: RoundedWeight) -> Tensor:
    scales = torch.from_numpy(one.scales.copy())
    tensor: Tensor = IntxUnpackedToInt8Tensor(
        torch.from_numpy(one.integers.copy()),
        scales,
        torch.zeros(scales.shape, dtype=torch.int8),
        getattr(torch, one.precision),
        (1, one.block),
        torch.float32,
        _BY_ROW,
    )
    return tensor


_TYPES: Mapping[str, Precision] = {
    "xnn_datatype_qcint8": "int8",
    "xnn_datatype_qint8": "int8",
    "xnn_datatype_qcint4": "int4",
    "xnn_datatype_qbint4": "int4",
}
_WEIGHTS = {"XNNConv2d": 0, "XNNDepthwiseConv2d": -1, "XNNFullyConnected": 0}
_HEADER = "<HIIIQ"  # after the magic: its length, then where the graph and the constants are, and their sizes


def read_weights(path: Path) -> tuple[RoundedWeight, ...]:
    """Every weight of 8 or 4 bits in XNNPACK's delegates, also of static files, and every rounded embedding's."""
    file = deserialize_pte_binary(path.read_bytes())
    found: dict[str, RoundedWeight] = {}
    graphs = read_delegates(file.program, path.name)
    for delegate, graph in zip(file.program.backend_delegate_data, graphs, strict=True):
        for one in _read_graph(graph, bytes(delegate.data), file.named_data):
            found.setdefault(one.name, one)
    return (*found.values(), *_read_embeddings(file.program))


def _read_graph(graph: dict[str, Any], payload: bytes, named: Any) -> Iterator[RoundedWeight]:  # noqa: ANN401 - ExecuTorch's
    tensors = {_inner(value)["id_out"]: value["xvalue_union"] for value in graph["xvalues"]}
    for node in graph["xnodes"]:
        kind, body = node["xnode_union_type"], node["xnode_union"]
        if kind not in _WEIGHTS:
            continue
        value = tensors[body["filter_id"]]
        tensor = value.get("tensor_value", value)
        precision = _TYPES.get(tensor["datatype"])
        if precision is None:
            continue
        raw = _read_constant(graph, tensor["constant_buffer_idx"], payload, named)
        integers = _order(_read_integers(raw, tensor["dims"], precision), kind)
        key = graph["constant_data"][tensor["constant_buffer_idx"]]["named_key"]
        scales = _read_scales(graph, value, payload, named, len(integers))
        yield RoundedWeight(
            name=key or f"{kind} {body['filter_id']}", precision=precision, integers=integers, scales=scales
        )


def _inner(value: dict[str, Any]) -> dict[str, Any]:
    union: dict[str, Any] = value["xvalue_union"]
    inner: dict[str, Any] = union.get("tensor_value", union)
    return inner


def _read_constant(graph: dict[str, Any], place: int, payload: bytes, named: Any) -> bytes:  # noqa: ANN401 - ExecuTorch's
    """A constant of a delegate: in the file's named data, or in the delegate's own."""
    entry = graph["constant_data"][place]
    if entry["named_key"]:
        return bytes(named.buffers[named.pte_data[entry["named_key"]].buffer_index])
    _, _, _, offset, _ = struct.unpack_from(_HEADER, payload, 8)
    start = offset + entry["offset"]
    return payload[start : start + entry["size"]]


def _read_integers(raw: bytes, sides: list[int], precision: Precision) -> NDArray[np.int8]:
    if precision == "int8":
        return np.frombuffer(raw, np.int8).reshape(sides)
    packed = np.frombuffer(raw, np.uint8).reshape(sides[0], -1)  # of a fully connected layer; zero is 8
    return (unpack_nibbles(packed, sides[1]) - 8).astype(np.int8)


def _order(integers: NDArray[np.int8], kind: str) -> NDArray[np.int8]:
    """Outputs first, then torch's order of inputs and places: XNNPACK has channels last."""
    if kind == "XNNConv2d":
        integers = np.moveaxis(integers, -1, 1)
    elif kind == "XNNDepthwiseConv2d":
        integers = np.moveaxis(integers, -1, 0)
    return np.ascontiguousarray(integers).reshape(len(integers), -1)


def _read_scales(
    graph: dict[str, Any], value: dict[str, Any], payload: bytes, named: Any, rows: int  # noqa: ANN401 - ExecuTorch's
) -> NDArray[np.float32]:  # fmt: skip
    scheme = value["quant_params"]
    if value["quant_params_type"] == "PerTensorQuant":
        return np.full((rows, 1), scheme["scale"], np.float32)
    if not scheme.get("scale_buffer_idx"):
        return np.asarray(scheme["scale"], np.float32).reshape(rows, -1)
    raw = _read_constant(graph, scheme["scale_buffer_idx"], payload, named)
    if value["quant_params_type"] == "PerChannelGroupQuant":  # bfloat16: the upper half of a float
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(rows, -1)
    return np.frombuffer(raw, np.float32).reshape(rows, -1)


_KINDS: Mapping[int, type[np.generic]] = {0: np.uint8, 1: np.int8, 6: np.float32}  # ExecuTorch's scalar types


def _read_embeddings(program: Any) -> Iterator[RoundedWeight]:  # noqa: ANN401 - ExecuTorch's record
    """Every look-up in a constant of integers, with that in its scales, which is the next one at the same places."""
    for plan in program.execution_plan:
        waiting: dict[int, NDArray[Any]] = {}
        for number, call in enumerate(one.instr_args for chain in plan.chains for one in chain.instructions):
            if not isinstance(call, KernelCall) or plan.operators[call.op_index].name != "aten::embedding":
                continue
            table, places = plan.values[call.args[0]].val, call.args[1]
            kind = _KINDS.get(int(table.scalar_type))
            if not table.data_buffer_idx or kind is None:
                continue
            raw = bytes(program.constant_buffer[table.data_buffer_idx].storage)
            array = np.frombuffer(raw, kind, count=int(np.prod(table.sizes))).reshape(table.sizes)
            if kind is not np.float32:
                waiting[places] = array
            elif places in waiting:
                yield _pair(f"embedding {number} at {places}", waiting.pop(places), array)


def _pair(name: str, integers: NDArray[Any], scales: NDArray[Any]) -> RoundedWeight:
    if integers.dtype == np.int8:
        return RoundedWeight(name=name, precision="int8", integers=integers, scales=scales)
    halves = np.concatenate([integers & 15, integers >> 4], 1).astype(np.int16) - 8
    return RoundedWeight(name=name, precision="int4", integers=halves.astype(np.int8), scales=scales)
