"""ONNX files of a matrix product, made without an exporter."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.float32]
OPSET = 18
WEIGHT: Array = (np.arange(12).reshape(4, 3) / 10).astype(np.float32)
SAMPLES: Array = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


def make_products(*weights: Array, rows: int | None = None) -> onnx.ModelProto:
    """A chain of matrix products from x to y; of vectors, or of matrices of that many rows."""
    names = ["x", *(f"h{number}" for number in range(1, len(weights))), "y"]
    batch = [1] if rows is None else [1, rows]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [names[n], f"w{n}"], [names[n + 1]]) for n in range(len(weights))],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*batch, weights[0].shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*batch, weights[-1].shape[1]])],
        [numpy_helper.from_array(matrix, f"w{n}") for n, matrix in enumerate(weights)],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", OPSET)])


def save_product(path: Path, weight: Array = WEIGHT, samples: Array = SAMPLES) -> Path:
    """Write a matrix product as ONNX, and samples for it into x.npy beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(make_products(weight), path)
    np.save(path.with_name("x.npy"), samples)
    return path
