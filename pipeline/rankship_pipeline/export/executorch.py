"""Exports to ExecuTorch with the XNNPACK delegate."""

import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import executorch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir._serialize._program import deserialize_pte_binary
from torch.export import ExportedProgram

from rankship_pipeline.export import Operator
from rankship_pipeline.export.shapes import Axes
from rankship_pipeline.foundation.errors import BuildError, UnsupportedOp

_HEADER_MAGIC = b"XH00"  # XNNHeader: 4 bytes zero, magic, u16 length, u32 flatbuffer offset, u32 flatbuffer size
_WEIGHTED = {"XNNConv2d", "XNNFullyConnected"}


def export_graph(graph: ExportedProgram, path: Path, _axes: Axes = ()) -> None:
    """Lower to XNNPACK where possible and write the .pte."""
    try:
        program = to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as failure:  # a converter's passes raise errors of any type
        raise UnsupportedOp(
            f"ExecuTorch cannot express the model: {type(failure).__name__}: {failure}", hint="see the operator above"
        ) from failure
    path.write_bytes(program.buffer)


def list_operators(path: Path) -> tuple[Operator, ...]:
    """Convolutions (OHWI) and linear operators (out, in) inside every XNNPACK delegate of the file."""
    found = []
    for graph in _read_delegates(path):
        tensors = dict(_name_tensors(graph))
        for node in graph["xnodes"]:
            kind, body = node["xnode_union_type"], node["xnode_union"]
            if kind in _WEIGHTED:
                rows, *rest = tensors[body["filter_id"]]
                found.append(Operator(kind=kind, rows=rows, columns=prod(rest)))
    return tuple(found)


def _name_tensors(graph: dict[str, Any]) -> Iterator[tuple[int, list[int]]]:
    for value in graph["xvalues"]:
        body = value["xvalue_union"]
        tensor = body.get("tensor", body)
        yield tensor["id_out"], tensor["dims"]


def _read_delegates(path: Path) -> Iterator[dict[str, Any]]:
    """Each delegate's XNNPACK graph, read with the schema and the flatc compiler in ExecuTorch's package."""
    home = Path(next(iter(executorch.__path__)))
    for delegate in deserialize_pte_binary(path.read_bytes()).program.backend_delegate_data:
        payload = bytes(delegate.data)
        if payload[4:8] != _HEADER_MAGIC:
            raise BuildError(f"{path.name}: a delegate is not XNNPACK's", hint="export it with the XNNPACK backend")
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
