"""Chains of matrices in files of two formats, made without an exporter, and what they compute."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as tflite
from flatbuffers import Builder
from numpy.typing import NDArray

from make.artifacts import make_proof
from rankship_pipeline.foundation.artifact_key import ArtifactKey, Variant
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.records import Verified

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    """A chain of matrices in a file, and what it computes."""

    path: Path
    weights: list[Weights] = field(repr=False)
    verified: Verified

    def compute(self, x: Weights) -> Weights:
        for matrix in self.weights:
            x = (x @ matrix).astype(np.float32)
        return x


def prove_bytes(data: bytes, kind: Format, variant: Variant) -> Verified:
    """A proof by numpy, not signed."""
    sha256 = hashlib.sha256(data).hexdigest()
    return make_proof(
        sha256, ArtifactKey(variant=variant, format=kind), runtime="numpy", runtime_version=np.__version__, samples=3
    )


def make_tflite(weights: list[Weights]) -> bytes:
    """Build fully connected layers by the format's own schema: an exporter would take half a minute."""
    graph, model = tflite.SubGraphT(), tflite.ModelT()
    model.version, model.buffers, graph.tensors, graph.operators = 3, [tflite.BufferT()], [], []

    def add(name: str, shape: tuple[int, ...], data: bytes | None = None) -> int:
        tensor = tflite.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), tflite.TensorType.FLOAT32, 0
        if data is not None:
            buffer = tflite.BufferT()
            buffer.data = list(data)
            model.buffers.append(buffer)
            tensor.buffer = len(model.buffers) - 1
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    current = add("args_0", (1, weights[0].shape[0]))
    graph.inputs = [current]
    for number, matrix in enumerate(weights):
        layer = tflite.OperatorT()
        layer.builtinOptionsType = tflite.BuiltinOptions.FullyConnectedOptions
        layer.builtinOptions = tflite.FullyConnectedOptionsT()
        weight = add(f"w{number}", matrix.T.shape, np.ascontiguousarray(matrix.T).tobytes())
        layer.inputs = [current, weight, -1]
        current = add(f"output_{number}", (1, matrix.shape[1]))
        layer.outputs = [current]
        graph.operators.append(layer)
    graph.outputs = [current]
    code = tflite.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = tflite.BuiltinOperator.FULLY_CONNECTED
    model.operatorCodes, model.subgraphs = [code], [graph]
    builder = Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
