"""What a runtime lacks is refused, and what delegates take is counted from what runtimes say."""

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from make.onnx_files import save_product
from rankship_targets.agent import delegates, protocol, runtimes, taken

# Nodes as LiteRT tells them: a file's own, then one for each partition.
NODES: list[dict[str, Any]] = [
    {"op_name": "CONV_2D", "inputs": [0, 1], "outputs": [2]},
    {"op_name": "RELU", "inputs": [2], "outputs": [3]},
    {"op_name": "CUMSUM", "inputs": [3], "outputs": [4]},
    {"op_name": "FULLY_CONNECTED", "inputs": [4, 5], "outputs": [6]},
]
FIRST = {"op_name": "DELEGATE", "inputs": [0, 1], "outputs": [3]}
LAST = {"op_name": "DELEGATE", "inputs": [4, 5], "outputs": [6]}


def test_the_operators_of_a_partition_are_those_between_its_inputs_and_outputs() -> None:
    assert taken.count_operators(NODES) == (0, 0, {"CONV_2D": 1, "RELU": 1, "CUMSUM": 1, "FULLY_CONNECTED": 1})
    assert taken.count_operators([*NODES, FIRST]) == (1, 2, {"CUMSUM": 1, "FULLY_CONNECTED": 1})
    assert taken.count_operators([*NODES, FIRST, LAST]) == (2, 3, {"CUMSUM": 1})


def test_a_partition_in_onnxruntimes_trace_is_a_stretch_of_nodes_of_another_provider() -> None:
    def tell(kind: str, provider: str, moment: str = "kernel_time") -> dict[str, Any]:
        return {"cat": "Node", "name": f"{kind}_{moment}", "args": {"op_name": kind, "provider": provider}}

    cpu, other = delegates.CPU_PROVIDER, delegates.PROVIDERS["xnnpack"]
    events = [
        {"cat": "Session", "name": "model_loading"},
        tell("Conv", other, "fence_before"),
        tell("Conv", other),
        tell("Relu", other),
        tell("CumSum", cpu),
        tell("Gemm", other),
        tell("Gemm", cpu),
    ]
    assert taken.count_nodes(events) == (2, 3, {"CumSum": 1, "Gemm": 1})


def test_this_machines_onnxruntime_tells_its_nodes(tmp_path: Path) -> None:
    model = save_product(tmp_path / "tiny.onnx")
    request = {"format": "onnx", "artifact": str(model), "inputs": [str(tmp_path / "x.npy")], "threads": 1}
    event, done = taken.inspect(request)
    assert event == {"event": "taken", "partitions": 0, "operators": 0, "left": {"MatMul": 1}}
    assert done == {"event": "done"}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["tiny.onnx", "x.npy"]


@pytest.mark.parametrize("delegate", ["xnnpack", "nnapi", "gpu"])
def test_a_provider_that_is_not_built_in_is_refused_and_no_session_is_opened(
    delegate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [delegates.CPU_PROVIDER])
    loader, _ = runtimes.open_runtime("onnx", delegate)
    with pytest.raises(protocol.Fault) as refused:
        runtimes.load_artifact(loader, {"artifact": str(save_product(tmp_path / "tiny.onnx")), "threads": 1})
    assert refused.value.args[0] == "lacks_runtime"
    assert "only CPUExecutionProvider" in refused.value.args[1]


def test_xnnpacks_provider_comes_before_the_cpus_and_brings_its_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    asked: list[Any] = []
    there = [delegates.PROVIDERS["xnnpack"], delegates.CPU_PROVIDER]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda _, __, providers: asked.append(providers))
    delegates.open_onnx_session("m.onnx", 3, "xnnpack")
    delegates.open_onnx_session("m.onnx", 3)
    assert asked == [[(there[0], {"intra_op_num_threads": "3"}), there[1]], [there[1]]]
    assert delegates.find_providers() == ["cpu", "xnnpack"]


def test_litert_is_never_asked_for_what_its_python_interface_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some_litert", SimpleNamespace(Interpreter=None))
    with pytest.raises(protocol.Fault, match="benchmark_model may"):
        delegates.open_interpreter("some_litert", "m.tflite", 1, "gpu")


def test_two_builds_of_one_version_have_other_binaries(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(value: str) -> None:
        names = {"a/lib.so.1": value, "a/module.py": "other"}
        files = [SimpleNamespace(suffixes=Path(name).suffixes, hash=SimpleNamespace(value=has), __str__=None)
                 for name, has in names.items()]  # fmt: skip
        monkeypatch.setattr(importlib.metadata, "files", lambda _: files)

    install("1")
    first = runtimes.identify("some")
    install("2")
    assert first["process"] == "python"
    assert first["binary_sha256"] != runtimes.identify("some")["binary_sha256"]
    monkeypatch.setattr(importlib.metadata, "files", lambda _: None)
    assert runtimes.identify("some")["binary_sha256"] is None
