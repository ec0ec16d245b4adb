"""Weights of fewer bits in TFLite files: stores them with ai-edge-quantizer, and reads them from any file.

The quantiser rounds each row, or block of 32 in a row, by its largest number: weights on their grid stay what they are.
It keeps the scales of blocks in bfloat16, so those of a grid must fit it.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from ai_edge_quantizer import qtyping, quantizer, recipe_manager
from numpy.typing import NDArray
from torch import Tensor, nn

from rankship_pipeline.export.dynamic import change_input
from rankship_pipeline.export.rounded_weight import Floats, RoundedWeight, find_same, list_stored, unpack_nibbles
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.models.layers import find_kind
from rankship_pipeline.quantise.grid import BITS
from rankship_pipeline.recipe.precision import Activations

# Operators with a weight: its place among the inputs, and the axis that holds its outputs, as in tflite.py.
_WEIGHTS = {
    "CONV_2D": (1, 0),
    "DEPTHWISE_CONV_2D": (1, -1),
    "FULLY_CONNECTED": (1, 0),
    "BATCH_MATMUL": (1, -1),
    "EMBEDDING_LOOKUP": (1, 0),
    "GATHER": (0, 0),
}
_NAMES = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
_TYPES: dict[int, Precision] = {schema.TensorType.INT8: "int8", schema.TensorType.INT4: "int4"}
_CONVOLUTIONS = {"CONV_2D", "DEPTHWISE_CONV_2D"}  # dynamic ones are up to three times slower than float32
_MARK = -3e38  # no activation is less
_BLOCKS = {
    32: qtyping.QuantGranularity.BLOCKWISE_32,
    64: qtyping.QuantGranularity.BLOCKWISE_64,
    128: qtyping.QuantGranularity.BLOCKWISE_128,
    256: qtyping.QuantGranularity.BLOCKWISE_256,
}


@dataclass(frozen=True)
class _Weighted:
    """One operator with a constant weight: its kind, its name for the quantiser, its weight, the outputs' axis."""

    kind: str
    scope: str
    weight: Any
    axis: int


def mark_inputs(module: nn.Module, weights: Sequence[RoundedWeight]) -> nn.Module:
    """A copy of a module to trace and convert instead, in which rounded linear layers keep their weights.

    LiteRT's converter multiplies the scale of a layer norm into the linear layers that read it, off their grid. Here an
    operator that changes nothing stands between; `quantise_file` takes it out again.
    """
    marked = copy.deepcopy(module)
    for one in weights:
        layer = marked.get_submodule(one.name)
        if find_kind(layer) == "linear":
            change_input(layer, _mark)
    return marked


def _mark(x: Tensor) -> Tensor:
    return torch.maximum(x, torch.full((), _MARK))


def _unmark(model: Any) -> None:  # noqa: ANN401 - the schema's own
    for graph in model.subgraphs:
        instead: dict[int, int] = {}
        kept = []
        for operator in graph.operators:
            operator.inputs = [instead.get(one, one) for one in operator.inputs]
            if (source := _find_marked(model, graph, operator)) is None:
                kept.append(operator)
            else:
                instead[operator.outputs[0]] = source
        graph.operators = kept
        graph.outputs = [instead.get(one, one) for one in graph.outputs]


def _find_marked(model: Any, graph: Any, operator: Any) -> int | None:  # noqa: ANN401 - the schema's own
    """What a mark reads; None for any other operator."""
    if _name_kind(model, operator) != "MAXIMUM":
        return None
    for place, other in ((0, 1), (1, 0)):
        tensor = graph.tensors[operator.inputs[place]]
        data = model.buffers[tensor.buffer].data
        constant = data is not None and len(data) > 0 and tensor.type == schema.TensorType.FLOAT32
        if constant and (np.frombuffer(bytes(data), np.float32) == np.float32(_MARK)).all():
            return int(operator.inputs[other])
    return None


def _name_kind(model: Any, operator: Any) -> str:  # noqa: ANN401 - the schema's own
    code = model.operatorCodes[operator.opcodeIndex]
    return str(_NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)])


def quantise_file(
    source: Path, target: Path, weights: Sequence[RoundedWeight], activations: Activations
) -> tuple[RoundedWeight, ...]:
    """Write a float32 file with these weights in fewer bits, and list those that the file holds.

    A weight is found by its numbers; others stay float32. With "dynamic" activations matrix products round their own
    as they run; convolutions, and all with "float32", have their weights made float32.
    """
    model = _load(source)
    alike: dict[tuple[str, bool, Precision, int | None], list[str]] = {}
    stored: list[RoundedWeight] = []
    for one in _list_weighted(model):
        matrix = _read_floats(model, one)
        weight = None if matrix is None else find_same(matrix, weights)
        if weight is None:
            continue
        stored.append(weight)
        alone = activations == "float32" or one.kind in _CONVOLUTIONS
        block = weight.block if weight.scales.shape[1] > 1 else None
        alike.setdefault((one.kind, alone, weight.precision, block), []).append(one.scope)
    _unmark(model)
    plain = flatbuffer_utils.convert_object_to_bytearray(model)
    rounder = quantizer.Quantizer(bytearray(plain), _write_recipe(alike).get_quantization_recipe())
    target.write_bytes(bytes(rounder.quantize().quantized_model))
    return list_stored(weights, stored)


def _write_recipe(alike: Mapping[tuple[str, bool, Precision, int | None], Sequence[str]]) -> Any:  # noqa: ANN401 - its own
    """One rule for all operators alike: of one kind, type and block, with activations rounded or not.

    The quantiser tries every rule on every operator, and Python keeps 512 patterns compiled: with a rule for each
    operator it was not done with a language model of 30 blocks in five minutes.
    """
    recipe = recipe_manager.RecipeManager()
    for (kind, alone, precision, block), scopes in alike.items():
        add = recipe.add_weight_only_config if alone else recipe.add_dynamic_config
        granularity = qtyping.QuantGranularity.CHANNELWISE if block is None else _BLOCKS[block]
        pattern = f"^(?:{'|'.join(map(re.escape, dict.fromkeys(scopes)))})$"
        try:
            add(pattern, qtyping.TFLOperationName(kind), BITS[precision], granularity=granularity)
        except ValueError as failure:
            raise BuildError(
                f"{scopes[0]}: TFLite cannot store it in {precision}: {failure}", hint="leave it float32"
            ) from failure
    return recipe


def read_weights(path: Path) -> tuple[RoundedWeight, ...]:
    """Every weight of 8 or 4 bits of a convolution, matrix product or embedding in a file, also of static ones."""
    model = _load(path)
    found: dict[str, RoundedWeight] = {}
    for one in _list_weighted(model):
        if (precision := _TYPES.get(one.weight.type)) is not None and one.weight.quantization is not None:
            stored = _read_rounded(model, one, precision)
            found.setdefault(f"{stored.name} {one.axis}", stored)
    return tuple(found.values())


def _load(path: Path) -> Any:  # noqa: ANN401 - the schema's own
    """A file's content; of large files the weights lie behind the flatbuffer and are fetched from there."""
    return flatbuffer_utils.read_model(str(path))


def _list_weighted(model: Any) -> Iterator[_Weighted]:  # noqa: ANN401 - the schema's own
    for graph in model.subgraphs:
        for operator in graph.operators:
            kind = _name_kind(model, operator)
            if kind not in _WEIGHTS:
                continue
            place, axis = _WEIGHTS[kind]
            weight = graph.tensors[operator.inputs[place]]
            dequantised = _find_source(model, graph, operator.inputs[place])
            scope = "".join(f"{graph.tensors[one].name.decode()};" for one in operator.outputs)
            yield _Weighted(kind, scope, weight if dequantised is None else dequantised, axis)


def _find_source(model: Any, graph: Any, place: int) -> Any:  # noqa: ANN401 - the schema's own
    """What a DEQUANTIZE operator reads that makes this tensor: a weight that is stored alone in fewer bits."""
    for operator in graph.operators:
        if place in operator.outputs and _name_kind(model, operator) == "DEQUANTIZE":
            return graph.tensors[operator.inputs[0]]
    return None


def _read_floats(model: Any, one: _Weighted) -> Floats | None:  # noqa: ANN401 - the schema's own
    data = model.buffers[one.weight.buffer].data
    if one.weight.type != schema.TensorType.FLOAT32 or data is None or len(one.weight.shape) < 2:  # noqa: PLR2004
        return None
    array = np.frombuffer(bytes(data), np.float32).reshape(one.weight.shape)
    return _order(array, one)


def _order(array: NDArray[Any], one: _Weighted) -> NDArray[Any]:
    """A weight in torch's order, (outputs, inputs·kh·kw): files have channels last."""
    if one.kind == "CONV_2D":
        array = np.moveaxis(array, -1, 1)  # OHWI
    elif one.kind == "DEPTHWISE_CONV_2D":
        array = np.moveaxis(array, -1, 0)  # 1HWO
    elif one.kind == "BATCH_MATMUL":
        array = array.reshape(array.shape[-2:]).T
    return np.ascontiguousarray(array).reshape(len(array), -1)


def _read_rounded(model: Any, one: _Weighted, precision: Precision) -> RoundedWeight:  # noqa: ANN401 - the schema's own
    shape = tuple(int(side) for side in one.weight.shape)
    raw = np.frombuffer(bytes(model.buffers[one.weight.buffer].data), np.uint8)
    integers = raw.view(np.int8)
    if precision == "int4":
        unsigned = unpack_nibbles(raw, int(np.prod(shape)))
        integers = ((unsigned ^ 8) - 8).astype(np.int8)  # the sign of four bits
    ordered = _order(integers.reshape(shape), one)
    rows = len(ordered)
    scales = _read_scales(model, one)
    if scales.size == 1:
        scales = np.broadcast_to(scales.reshape(-1), (rows,))
    return RoundedWeight(
        name=one.weight.name.decode(),
        precision=precision,
        integers=ordered,
        scales=scales.reshape(rows, -1).astype("f4"),
    )


def _read_scales(model: Any, one: _Weighted) -> NDArray[Any]:  # noqa: ANN401 - the schema's own
    details = one.weight.quantization
    if details.detailsType == schema.QuantizationDetails.BlockwiseQuantization:
        graph = next(graph for graph in model.subgraphs if any(tensor is one.weight for tensor in graph.tensors))
        scales = graph.tensors[details.details.scales]
        return np.frombuffer(bytes(model.buffers[scales.buffer].data), np.float16)
    return np.asarray(details.scale, np.float32)
