"""Gives a quantised TFLite file inputs and outputs of float32, as its converter makes them of 8 bits."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

_VERSIONS = {schema.BuiltinOperator.QUANTIZE: 1, schema.BuiltinOperator.DEQUANTIZE: 2}  # the first that know int8


def restore_borders(path: Path) -> None:
    """Add an operator QUANTIZE after every input of 8 bits, and DEQUANTIZE before every such output."""
    model = flatbuffer_utils.read_model(str(path))
    for graph in model.subgraphs:
        entered = {index: _add_float(graph, index) for index in _list_rounded(graph, graph.inputs)}
        left = {index: _add_float(graph, index) for index in _list_rounded(graph, graph.outputs)}
        before = [_make(model, schema.BuiltinOperator.QUANTIZE, outer, own) for own, outer in entered.items()]
        after = [_make(model, schema.BuiltinOperator.DEQUANTIZE, own, outer) for own, outer in left.items()]
        graph.operators = [*before, *graph.operators, *after]
        graph.inputs = [entered.get(int(index), int(index)) for index in graph.inputs]
        graph.outputs = [left.get(int(index), int(index)) for index in graph.outputs]
        for signature in model.signatureDefs or ():
            for named, changed in ((signature.inputs, entered), (signature.outputs, left)):
                for one in named:
                    one.tensorIndex = changed.get(one.tensorIndex, one.tensorIndex)
    flatbuffer_utils.write_model(model, str(path))


def _list_rounded(graph: Any, indexes: Iterable[int]) -> list[int]:  # noqa: ANN401 - the schema's own record
    return list(dict.fromkeys(int(one) for one in indexes if graph.tensors[one].type == schema.TensorType.INT8))


def _add_float(graph: Any, index: int) -> int:  # noqa: ANN401 - as above
    """Add a float32 tensor of a tensor's shape, which takes over its name; the index of the new one."""
    rounded = graph.tensors[index]
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.shapeSignature = rounded.name, rounded.shape, rounded.shapeSignature
    tensor.type, tensor.buffer, tensor.hasRank = schema.TensorType.FLOAT32, 0, rounded.hasRank  # buffer 0: no constant
    rounded.name += b"_rounded"
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _make(model: Any, code: int, source: int, target: int) -> Any:  # noqa: ANN401 - as above
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = _find_code(model, code), [source], [target]
    return operator


def _find_code(model: Any, code: int) -> int:  # noqa: ANN401 - as above
    """The place of an operator in the file's table of operators, added if it is missing."""
    known = [one.builtinCode for one in model.operatorCodes]
    if code not in known:
        added = schema.OperatorCodeT()
        added.builtinCode, added.deprecatedBuiltinCode, added.version = code, code, _VERSIONS[code]
        model.operatorCodes.append(added)
        return len(known)
    return known.index(code)
