"""Exports to ExecuTorch with the XNNPACK delegate; where that is asked for, with Vulkan's or with none."""

import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import pi, prod, sqrt
from pathlib import Path
from typing import Any

import executorch
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, to_edge, to_edge_transform_and_lower
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.passes.constant_prop_pass import constant_prop_pass
from executorch.exir.schema import KernelCall
from torch import Tensor
from torch.export import ExportedProgram

from rankship_pipeline.export import Operator
from rankship_pipeline.export.eight_bits import fold_weights
from rankship_pipeline.export.shapes import Axes
from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.errors import BuildError, UnsupportedOp

_GELU = torch.ops.aten.gelu.default
_HEADER_MAGIC = b"XH00"  # XNNHeader: 4 bytes zero, magic, u16 length, u32 flatbuffer offset, u32 flatbuffer size
# XNNPACK's operators with a weight, and the axis of the weight that holds its outputs: OHWI, (out, in), 1HWO.
_OUTPUTS_AT = {"XNNConv2d": 0, "XNNFullyConnected": 0, "XNNDepthwiseConv2d": -1}
_TRANSPOSE_WEIGHTS = 1  # a flag of XNNFullyConnected: (in, out)
# Those that are not delegated, and the places of their factors, W·x before x·W.
_FACTORS = {"aten::convolution": (1,), "aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2)}


def export_graph(graph: ExportedProgram, path: Path, _axes: Axes = ()) -> None:
    """Lower to XNNPACK where possible and write the .pte."""
    path.write_bytes(lower_graph(graph))


def export_for(delegate: Delegate, graph: ExportedProgram, path: Path) -> None:
    """Write the .pte for Vulkan, or for ExecuTorch's own kernels, with what is constant computed beforehand."""
    with _explaining():
        edge = to_edge(graph) if delegate == "plain" else _lower_to_vulkan(graph)
        constant_prop_pass(edge.exported_program())
        path.write_bytes(edge.to_executorch().buffer)


def _lower_to_vulkan(graph: ExportedProgram) -> EdgeProgramManager:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return to_edge_transform_and_lower(graph, partitioner=[VulkanPartitioner()])


@contextmanager
def _explaining() -> Iterator[None]:
    """Turn what a converter's passes raise, errors of any type, into UnsupportedOp."""
    try:
        yield
    except Exception as failure:
        raise UnsupportedOp(
            f"ExecuTorch cannot express the model: {type(failure).__name__}: {failure}", hint="see the operator above"
        ) from failure


def lower_graph(graph: ExportedProgram, told: dict[str, Any] | None = None) -> bytes:
    """The .pte of a graph, lowered to XNNPACK where possible.

    `told` are constants that it answers, by method, of a graph with buffers that it writes: in place then.
    """
    with _explaining():
        lowered = to_edge_transform_and_lower(
            spell_gelu(fold_weights(graph)), partitioner=[XnnpackPartitioner()], constant_methods=told
        )
        settings = ExecutorchBackendConfig(run_reinplace_pass=told is not None)
        return bytes(lowered.to_executorch(settings).buffer)


def spell_gelu(graph: ExportedProgram) -> ExportedProgram:
    """The graph with GELU by its formula wherever tanh approximates it: XNNPACK's delegate computes the exact one."""
    if not any(node.target is _GELU and node.kwargs.get("approximate") == "tanh" for node in graph.graph.nodes):
        return graph
    spelt: ExportedProgram = graph.run_decompositions({_GELU: _approximate_gelu})
    return spelt


def _approximate_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        return NotImplemented  # type: ignore[no-any-return]  # the node stays as it is
    return 0.5 * x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)))


def list_operators(path: Path) -> tuple[Operator, ...]:
    """Every convolution and matrix product with a constant weight, in XNNPACK's delegates and outside of them."""
    program = deserialize_pte_binary(path.read_bytes()).program
    return (*_list_delegated(program, path.name), *_list_portable(program))


def _list_delegated(program: Any, file: str) -> Iterator[Operator]:  # noqa: ANN401 - ExecuTorch's record
    for graph in read_delegates(program, file):
        tensors = dict(_name_tensors(graph))
        for node in graph["xnodes"]:
            kind, body = node["xnode_union_type"], node["xnode_union"]
            if kind in _OUTPUTS_AT:
                shape = tensors[body["filter_id"]]
                turned = kind == "XNNFullyConnected" and body["flags"] & _TRANSPOSE_WEIGHTS
                rows = shape[-1 if turned else _OUTPUTS_AT[kind]]
                yield Operator(kind=kind, rows=rows, columns=prod(shape) // rows)


def _list_portable(program: Any) -> Iterator[Operator]:  # noqa: ANN401 - ExecuTorch's record
    for plan in program.execution_plan:
        for call in (one.instr_args for chain in plan.chains for one in chain.instructions):
            name = plan.operators[call.op_index].name if isinstance(call, KernelCall) else ""
            for place in _FACTORS.get(name, ()):
                tensor = plan.values[call.args[place]].val
                if tensor.data_buffer_idx:  # a constant: of those that are computed it is 0
                    rows = tensor.sizes[0 if place == _FACTORS[name][0] else -1]
                    yield Operator(kind=name, rows=rows, columns=prod(tensor.sizes) // rows)


def _name_tensors(graph: dict[str, Any]) -> Iterator[tuple[int, list[int]]]:
    for value in graph["xvalues"]:
        body = value["xvalue_union"]
        tensor = body.get("tensor_value", body)  # a quantised tensor has its parameters beside it
        yield tensor["id_out"], tensor["dims"]


def read_delegates(program: Any, file: str) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - ExecuTorch's record
    """Each delegate's XNNPACK graph, read with the schema and the flatc compiler in ExecuTorch's package."""
    home = Path(next(iter(executorch.__path__)))
    for delegate in program.backend_delegate_data:
        payload = bytes(delegate.data)
        if payload[4:8] != _HEADER_MAGIC:
            raise BuildError(f"{file}: a delegate is not XNNPACK's", hint="export it with the XNNPACK backend")
        offset, size = struct.unpack_from("<II", payload, 10)
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "graph.bin"
            binary.write_bytes(payload[offset : offset + size])
            schema = home / "backends/xnnpack/serialization/schema.fbs"
            subprocess.run(
                [
                    home / "data/bin/flatc", "--json", "--strict-json", "--raw-binary", "--defaults-json",
                    "-o", folder, schema, "--", binary,
                ],
                check=True, capture_output=True,
            )  # fmt: skip
            text = binary.with_suffix(".json").read_text()
        # flatc writes bare inf and nan for activation bounds, which are not valid JSON
        yield json.loads(re.sub(r":\s*-?(?:inf|nan)\b", ": null", text))
