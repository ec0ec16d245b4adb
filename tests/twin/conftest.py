"""Fixtures of the stand-ins for a Raspberry Pi 4, and small models made on the spot for them."""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from ai_edge_litert import schema_py_generated as tflite
from flatbuffers import Builder
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rankship_pipeline.foundation.records import ArtifactKey, Format, Variant, Verified
from rankship_targets.devices.device import Device
from rankship_targets.session.manifest import sign_artifact
from rankship_targets.twin.debian_root import find_root
from rankship_targets.twin.machine import Machine, boot
from rankship_targets.twin.machine_files import PACKAGES, QEMU, TOOLS, find_machine_files
from rankship_targets.twin.pi import start_pi

Weights = NDArray[np.float32]
WIDTH, RANK = 256, 16
GONE_S = 60.0


@pytest.fixture(scope="session")
def able_pi(able_machine: None, make_or_skip: Callable[[Callable[[], Path]], Path]) -> None:  # noqa: ARG001 - it skips
    """Make what the stand-ins for a Raspberry Pi are made of, or skip."""
    make_or_skip(find_root)


@pytest.fixture(scope="session")
def pi4(able_pi: None) -> Device:  # noqa: ARG001 - it skips
    """Give the one everyday Pi that tests share; whoever must break a Pi starts another under its own name."""
    return start_pi(Device(name="pi4", transport="ssh"))


@pytest.fixture(scope="session")
def able_qemu(able_pi: None, make_or_skip: Callable[[Callable[[], Path]], Path]) -> None:  # noqa: ARG001 - it skips
    missing = [tool for tool in (QEMU, "fdtput", "mke2fs") if not shutil.which(tool, path=TOOLS)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install {PACKAGES}")
    make_or_skip(find_machine_files)


@pytest.fixture(scope="session")
def system_pi(able_qemu: None) -> Iterator[Machine]:  # noqa: ARG001 - it skips
    with boot() as machine:
        yield machine


@pytest.fixture(scope="session")
def icount_machine(able_qemu: None) -> Iterator[Machine]:  # noqa: ARG001 - it skips
    with boot(icount=True, name="counting-pi") as machine:
        yield machine


@pytest.fixture
def await_gone() -> Callable[[list[psutil.Process]], None]:
    """Wait until processes have ended, also those that nobody has reaped yet."""

    def is_alive(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def wait(family: list[psutil.Process]) -> None:
        deadline = time.monotonic() + GONE_S
        while alive := [one for one in family if is_alive(one)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.05)

    return wait


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


@pytest.fixture(scope="session")
def chains() -> dict[Variant, list[Weights]]:
    """Give two square matrices, and the same with each as a pair of rank 16."""
    random = np.random.default_rng(0)

    def draw(rows: int, columns: int) -> Weights:
        return random.normal(size=(rows, columns)).astype(np.float32) / np.float32(np.sqrt(rows))

    pairs = [draw(*shape) for shape in ((WIDTH, RANK), (RANK, WIDTH)) * 2]
    return {"dense": [draw(WIDTH, WIDTH) for _ in range(2)], "compressed": pairs}


@pytest.fixture
def models(model_files: dict[tuple[Format, Variant], Model]) -> dict[tuple[Format, Variant], Model]:
    """Give every model, signed as proven by the key that this test's user has."""
    for model in model_files.values():
        sign_artifact(model.path, model.verified, recipe_sha256="none")
    return model_files


@pytest.fixture(scope="session")
def model_files(
    chains: dict[Variant, list[Weights]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Format, Variant], Model]:
    folder = tmp_path_factory.mktemp("models")
    made: dict[tuple[Format, Variant], Model] = {}
    for variant, weights in chains.items():
        for name, data in (("onnx", make_onnx(weights)), ("tflite", make_tflite(weights))):
            kind: Format = "onnx" if name == "onnx" else "tflite"
            path = folder / f"{variant}.{kind}"
            path.write_bytes(data)
            made[kind, variant] = Model(path, weights, prove(data, kind, variant))
    return made


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "x.npy"
    np.save(path, np.random.default_rng(1).normal(size=(3, WIDTH)).astype(np.float32))
    return path


def prove(data: bytes, kind: Format, variant: Variant) -> Verified:
    return Verified(
        artifact_sha256=hashlib.sha256(data).hexdigest(),
        key=ArtifactKey(variant=variant, format=kind),
        runtime="numpy",
        runtime_version=np.__version__,
        samples=3,
        max_relative_error=0.0,
        min_cosine=1.0,
        top1_agreement=1.0,
    )


def make_onnx(weights: list[Weights]) -> bytes:
    names = ["x", *(f"h{number}" for number in range(1, len(weights))), "y"]
    nodes = [helper.make_node("MatMul", [names[n], f"w{n}"], [names[n + 1]]) for n in range(len(weights))]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weights[0].shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weights[-1].shape[1]])],
        [numpy_helper.from_array(matrix, f"w{n}") for n, matrix in enumerate(weights)],
    )
    made = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


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
