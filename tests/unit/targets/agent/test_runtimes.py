"""Runtimes beside ONNX's, and what they tell of each operator."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from make.agents import ask_infer, ask_measure, call_agent, find_event
from rankship_targets.agent import litert_profile, profiles, protocol


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tflite", "executorch"])
def test_other_runtimes_take_two_inputs_and_give_two_outputs_in_order(tmp_path: Path, kind: str) -> None:
    script = tmp_path / "export.py"
    script.write_text(EXPORT)
    subprocess.run([sys.executable, script, kind, tmp_path / "model"], check=True, capture_output=True, timeout=300)
    np.save(tmp_path / "x.npy", np.full((2, 4), 0.5, np.float32))
    np.save(tmp_path / "ids.npy", np.array([[1, 2], [3, 4]], np.int64))
    inputs = [str(tmp_path / "x.npy"), str(tmp_path / "ids.npy")]
    events, done = call_agent(ask_infer(tmp_path / "model", format=kind, inputs=inputs))
    assert done.returncode == 0, events
    for position, expected in enumerate(("y", "z")):
        got = np.load(tmp_path / f"out.{position}.npy")
        np.testing.assert_allclose(got, np.load(tmp_path / f"{expected}.npy"), rtol=1e-5, atol=1e-6)
    events, done = call_agent(ask_measure(tmp_path / "model", format=kind, inputs=inputs))
    assert len(find_event(events, "samples")["ns"]) >= 20
    (tmp_path / "cut").write_bytes((tmp_path / "model").read_bytes()[:500])
    events, _ = call_agent(ask_infer(tmp_path / "model", format=kind, inputs=inputs, artifact=str(tmp_path / "cut")))
    assert events[-1]["kind"] == "bad_artifact"


EXPORT = """
import sys, pathlib, numpy, torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.l, self.k = torch.nn.Embedding(7, 3), torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
    def forward(self, x, ids):
        y = self.l(x) + self.e(ids).mean(1)
        return y, self.k(y)
kind, path = sys.argv[1], pathlib.Path(sys.argv[2])
model, x, ids = Model().eval(), torch.full((2, 4), 0.5), torch.tensor([[1, 2], [3, 4]])
for name, value in zip("yz", model(x, ids)):
    numpy.save(path.with_name(name + ".npy"), value.detach().numpy())
one = (x[:1], ids[:1])
if kind == "tflite":
    import litert_torch
    litert_torch.convert(model, one).export(str(path.with_suffix(".tflite")))
    path.with_suffix(".tflite").rename(path)
else:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    edge = to_edge_transform_and_lower(torch.export.export(model, one), partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)
"""


def test_load_tells_time_and_memory_without_an_inference(model: Path) -> None:
    request = {key: value for key, value in ask_infer(model).items() if key not in {"inputs", "output"}}
    events, done = call_agent({**request, "command": "load"})
    assert done.returncode == 0, events
    assert [event["event"] for event in events] == ["hello", "opened", "loaded", "done"]
    assert events[2]["load_ns"] > 0
    assert events[2]["rss_bytes"] >= events[1]["rss_bytes"] > 0


def test_a_profile_tells_every_operator_of_every_inference_and_leaves_nothing(model: Path) -> None:
    before = sorted(model.parent.iterdir())
    request = {key: value for key, value in ask_infer(model).items() if key != "output"}
    events, done = call_agent({**request, "command": "profile", "runs": 7})
    assert done.returncode == 0, events
    told = find_event(events, "profiled")
    assert [one["kind"] for one in told["operators"]] == ["MatMul", "Neg"]
    assert [len(one["ns"]) for one in told["operators"]] == [7, 7]
    assert len(told["inference_ns"]) == 7
    assert sorted(model.parent.iterdir()) == before


def test_a_runtime_without_a_profiler_is_lacking_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "PROFILERS", {})
    with pytest.raises(protocol.Fault) as refused:
        next(profiles.profile({**ask_infer(model), "runs": 1}))
    assert refused.value.args[0] == "lacks_runtime"


def test_litert_of_another_release_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert_profile, "find_version", lambda _: "2.4.0")
    with pytest.raises(protocol.Fault) as refused:
        litert_profile.profile_litert({"artifact": "model", "runs": 1}, [], 1)
    assert refused.value.args[0] == "lacks_runtime"
