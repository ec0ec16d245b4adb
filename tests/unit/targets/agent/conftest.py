"""A model for the agent to run."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from make.onnx_files import SAMPLES, WEIGHT


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a 4→3 matrix product in a file whose name does not say its format."""
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], WEIGHT.ravel().tolist())
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Neg", ["y"], ["z"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 3]),
        ],
        [weights],
    )
    made = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(made, tmp_path / "model")
    np.save(tmp_path / "x.npy", SAMPLES)
    return tmp_path / "model"
