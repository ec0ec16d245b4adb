"""The agent as the device runs it: a file, a request, lines of JSON."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rankship_targets.agent import litert_profile, main, profiles, protocol, runtimes, system, timing
from rankship_targets.client.agent_file import find_agent, pack_agent

AGENT = find_agent()

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a 4→3 matrix product in a file whose name does not say its format."""
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], WEIGHTS.ravel().tolist())
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
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    return tmp_path / "model"


def call(
    request: object, *, root: Path | None = None, path: Path | None = None
) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    environment = dict(os.environ)
    environment |= {"RANKSHIP_AGENT_ROOT": str(root)} if root else {}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    text = request if isinstance(request, str) else json.dumps(request)
    done = subprocess.run(
        [sys.executable, AGENT, text], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done


SWEEP = {"command": "sweep", "format": "onnx", "threads": 1, "min_samples": 1, "min_duration_ms": 1, "max_warmup_ms": 1}


def ask_infer(model: Path, **changes: object) -> dict[str, object]:
    request: dict[str, object] = {"command": "infer", "format": "onnx", "artifact": str(model), "threads": 1}
    return {**request, "inputs": [str(model.parent / "x.npy")], "output": str(model.parent / "out"), **changes}


def ask_measure(model: Path, **changes: object) -> dict[str, object]:
    request = {key: value for key, value in ask_infer(model).items() if key != "output"}
    return {**request, "command": "measure", "min_samples": 20, "min_duration_ms": 5, "max_warmup_ms": 2000, **changes}


def find(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (event,) = [event for event in events if event["event"] == name]
    return event


def test_infer_computes_every_sample_and_output(model: Path) -> None:
    events, done = call(ask_infer(model))
    assert done.returncode == 0, done.stderr
    assert [event["event"] for event in events] == ["hello", "opened", "done"]
    assert events[-1]["outputs"] == 2
    assert events[1]["runtime"]["name"] == "onnxruntime"
    expected = np.load(model.parent / "x.npy") @ WEIGHTS
    np.testing.assert_allclose(np.load(model.parent / "out.0.npy"), expected, rtol=1e-5)
    np.testing.assert_allclose(np.load(model.parent / "out.1.npy"), -expected, rtol=1e-5)


def test_measure_keeps_every_sample_and_its_conditions(model: Path) -> None:
    events, done = call(ask_measure(model))
    assert done.returncode == 0, done.stderr
    samples, warmed = find(events, "samples")["ns"], find(events, "warmed")
    assert len(samples) >= 20
    assert sum(samples) > 0
    assert len(warmed["ns"]) >= timing.WINDOW_SAMPLES
    assert min(samples + warmed["ns"]) > 0
    assert find(events, "loaded")["load_ns"] > 0
    assert 0 < find(events, "opened")["rss_bytes"] <= warmed["peak_rss_bytes"]
    assert [event["when"] for event in events if event["event"] == "state"] == ["before", "after"]


def test_a_measurement_between_two_rests_tells_when_they_and_the_loop_were(model: Path) -> None:
    events, done = call(ask_measure(model, idle_ms=30))
    assert done.returncode == 0, done.stderr
    names = [event["event"] for event in events]
    assert names[:4] == ["hello", "settled", "idle", "state"]
    assert names[-3:] == ["samples", "idle", "done"]
    before, after = (event for event in events if event["event"] == "idle")
    loop = find(events, "samples")
    assert [before["when"], after["when"]] == ["before", "after"]
    instants = [one[key] for one in (before, loop, after) for key in ("start_ns", "end_ns")]
    assert instants == sorted(instants)
    assert min(one["end_ns"] - one["start_ns"] for one in (before, after)) >= 30_000_000
    assert loop["end_ns"] - loop["start_ns"] >= sum(loop["ns"])


def test_peak_memory_is_not_the_parents(model: Path) -> None:
    ballast = np.ones(60_000_000)  # 480 MB here, which ru_maxrss of a child would show
    events, _ = call(ask_measure(model))
    assert find(events, "warmed")["peak_rss_bytes"] < ballast.nbytes


def test_spent_warm_up_budget_is_told(model: Path) -> None:
    events, _ = call(ask_measure(model, max_warmup_ms=0))
    assert find(events, "warmed")["steady"] is False


@pytest.mark.parametrize(
    ("medians", "steady"),
    [
        ([], False),
        ([10, 10], False),
        ([10, 10, 10], True),
        ([90, 10, 10.1, 10.2], True),
        ([10.3, 10.2, 10.0], False),
        ([10, 10, 11], False),
        ([10.1, 10.05, 10], True),
    ],
)
def test_steadiness_needs_three_close_windows_that_do_not_fall(medians: list[float], steady: bool) -> None:  # noqa: FBT001
    assert medians == [] or timing.is_steady(medians) is steady


@pytest.mark.parametrize(
    ("request_text", "kind"),
    [
        ("", "bad_request"),
        ("[]", "bad_request"),
        ("nonsense", "bad_request"),
        ('{"command": "dance"}', "bad_request"),
        ('{"command": "infer"}', "bad_request"),
        (json.dumps({**SWEEP, "artifacts": [], "inputs": []}), "bad_request"),
        (json.dumps({**SWEEP, "artifacts": ["a", "b"], "inputs": [["x"]]}), "bad_request"),
        (json.dumps({**SWEEP, "artifacts": ["a"], "inputs": ["x"]}), "bad_request"),
        (json.dumps({**SWEEP, "artifacts": ["a"]}), "bad_request"),
        ('{"command": ["probe"]}', "bad_request"),
        ('{"command": "probe", "workdir": 3}', "bad_request"),
        ('{"command": "probe", "workdir": ".", "extra": 1}', "bad_request"),
        ('{"command": "probe", "workdir": "/no/such/folder"}', "failed"),
    ],
)
def test_wrong_requests_are_events(request_text: str, kind: str) -> None:
    events, done = call(request_text)
    assert (events[0]["event"], events[-1]["event"], events[-1]["kind"]) == ("hello", "error", kind)
    assert done.returncode == 1


@pytest.mark.parametrize("command", [ask_infer, ask_measure])
def test_truncated_absent_and_empty_artifacts_are_bad(model: Path, command: Callable[..., dict[str, object]]) -> None:
    (model.parent / "cut").write_bytes(model.read_bytes()[:60])
    (model.parent / "empty").write_bytes(b"")
    for name in ("cut", "empty", "absent"):
        events, done = call(command(model, artifact=str(model.parent / name)))
        assert (events[-1]["event"], events[-1]["kind"]) == ("error", "bad_artifact"), events
        assert name in events[-1]["message"]
        assert done.returncode == 1


def test_wrong_inputs_are_bad(model: Path) -> None:
    folder = model.parent
    (folder / "text.npy").write_text("no array")
    np.save(folder / "three.npy", np.ones((3, 4), np.float32))
    np.save(folder / "none.npy", np.ones((0, 4), np.float32))
    np.save(folder / "objects.npy", np.array([object()]), allow_pickle=True)
    for inputs in (["absent"], ["text"], ["objects"], ["none"], ["x", "three"], ["x", "x"], []):
        events, _ = call(ask_infer(model, inputs=[f"{folder}/{name}.npy" for name in inputs]))
        assert (events[-1]["event"], events[-1]["kind"]) == ("error", "bad_input"), (inputs, events)


def test_wrong_shape_is_the_runtimes_own_failure(model: Path) -> None:
    np.save(model.parent / "x.npy", np.ones((5, 9), np.float32))
    events, _ = call(ask_infer(model))
    assert events[-1]["kind"] == "failed"
    assert "invalid dimensions" in events[-1]["message"]


def test_runtime_that_is_not_installed_is_lacking(model: Path) -> None:
    request = json.dumps(ask_infer(model))
    isolated = subprocess.run(
        [sys.executable, "-S", "-I", AGENT, request], capture_output=True, text=True, check=False, timeout=60
    )
    last = json.loads(isolated.stdout.splitlines()[-1])
    assert (last["event"], last["kind"]) == ("error", "lacks_runtime")
    assert "onnx" in last["message"]


def test_runtime_that_cannot_be_imported_is_lacking(model: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/onnxruntime.py").write_text("raise ImportError('libfoo.so is missing')")
    events, _ = call(ask_infer(model), path=tmp_path / "site")
    assert events[-1]["kind"] == "lacks_runtime"
    assert "libfoo.so" in events[-1]["message"]


def test_runtime_that_prints_does_not_reach_the_protocol(model: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    noise = "import os\nprint('noise from python')\nos.write(1, b'noise from C\\n')\nraise SystemError('broken')\n"
    (tmp_path / "site/onnxruntime.py").write_text(noise)
    events, done = call(ask_infer(model), path=tmp_path / "site")
    assert [event["event"] for event in events] == ["hello", "error"]
    assert "noise from python" in done.stderr
    assert "noise from C" in done.stderr


@pytest.mark.parametrize(
    ("text", "waited_ns"),
    [
        ("1284711053 60252 113", 60_252),
        ("2210417 0 4", 0),
        ("0 0 0", None),  # compiled in, but switched off
        ("", None),
        ("not a number", None),
    ],
)
def test_a_threads_waiting_is_read_where_the_kernel_counts_it(text: str, waited_ns: int | None) -> None:
    assert system.parse_waited(text) == waited_ns


def test_a_measurement_that_shares_its_core_says_that_it_waited(model: Path) -> None:
    core = min(os.sched_getaffinity(0))
    hog = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"])
    try:
        events, done = call(ask_measure(model, cpus=[core], min_duration_ms=300))
    finally:
        hog.kill()
        hog.wait()
    assert done.returncode == 0, done.stderr
    samples = find(events, "samples")
    assert 0.01 * 300_000_000 < samples["waited_ns"] < samples["end_ns"] - samples["start_ns"]


def test_probe_reads_a_pretended_board(tmp_path: Path) -> None:
    write_board(tmp_path)
    events, done = call({"command": "probe", "workdir": str(tmp_path)}, root=tmp_path)
    assert done.returncode == 0, done.stderr
    probe = find(events, "probe")
    assert probe["cpu_model"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert probe["memory_bytes"] == 3_884_312 * 1024
    assert probe["free_bytes"] > 0
    assert probe["runtimes"]["onnx"][0] == "onnxruntime"
    assert probe["state"] == {
        "governor": "ondemand",
        "frequency_khz": [600_000, 1_500_000, 700_000],
        "temperature_mc": 48_212,
        "load_1m_milli": 520,
        "available_memory_bytes": 3_000_000 * 1024,
        "boot_id": "6f1c",
        "uptime_ms": 350_740,
        "clock_offset_ns": probe["state"]["clock_offset_ns"],
        "throttled_bits": 0x50005,
        "throttle_count": None,
        "cooling_steps": 2,
        "battery_percent": 81,
        "charging": False,
    }
    assert abs(time.time_ns() - time.monotonic_ns() - probe["state"]["clock_offset_ns"]) < 10**9


def test_probe_of_a_board_that_tells_nothing_says_none(tmp_path: Path) -> None:
    events, _ = call({"command": "probe", "workdir": str(tmp_path)}, root=tmp_path / "empty")
    state = find(events, "probe")["state"]
    assert state.pop("clock_offset_ns")
    assert set(state.values()) == {None}


def write_board(root: Path) -> None:
    files = {
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/meminfo": "MemTotal:        3884312 kB\nMemFree: 1 kB\nMemAvailable:    3000000 kB\n",
        "proc/uptime": "350.74 1234.56\n",
        "proc/sys/kernel/random/boot_id": "6f1c\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
        "sys/class/thermal/cooling_device0/cur_state": "2\n",
        "sys/class/thermal/cooling_device1/type": "gpio-fan\n",
        "sys/class/thermal/cooling_device1/cur_state": "1\n",
        "sys/class/power_supply/mouse/type": "Battery\n",
        "sys/class/power_supply/mouse/scope": "Device\n",
        "sys/class/power_supply/mouse/capacity": "12\n",
        "sys/class/power_supply/own/type": "Battery\n",
        "sys/class/power_supply/own/capacity": "81\n",
        "sys/class/power_supply/own/status": "Discharging\n",
        "proc/loadavg": "0.52 0.58 0.59 1/300 999\n",
        "sys/class/thermal/thermal_zone0/temp": "48212\n",
        "sys/class/thermal/thermal_zone1/temp": "31000\n",
        "sys/class/thermal/thermal_zone2/temp": "N/A\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
        "sys/devices/system/cpu/cpu2/cpufreq/scaling_cur_freq": "1500000\n",
        "sys/devices/system/cpu/cpu10/cpufreq/scaling_cur_freq": "700000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        "sys/devices/system/cpu/cpu2/cpufreq/scaling_governor": "ondemand\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_agent_ends_when_nobody_listens(model: Path) -> None:
    request = json.dumps(ask_measure(model, min_duration_ms=600_000))
    process = subprocess.Popen([sys.executable, AGENT, request], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with process:
        assert process.stdout is not None
        while b'"loaded"' not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        assert process.wait(timeout=30) == main.EXIT_UNHEARD


def test_tensors_are_sorted_by_the_position_in_their_names() -> None:
    names = ["serving_default_args_10:0", "serving_default_args_2:0", "serving_default_args_0:0"]
    assert [spec["name"] for spec in runtimes.sort_by_position([{"name": name} for name in names])] == names[::-1]
    named = [{"name": "b"}, {"name": "a"}]
    assert runtimes.sort_by_position(named) == named


def test_agent_imports_nothing_but_the_standard_library() -> None:
    bare = [sys.executable, "-S", "-I", str(AGENT), '{"command": "probe", "workdir": "."}']
    done = subprocess.run(bare, capture_output=True, text=True, check=True, timeout=60)
    last = json.loads(done.stdout.splitlines()[-2])
    assert last["runtimes"] == {"onnx": None, "tflite": None, "executorch": None}
    assert (last["numpy"], last["psutil"]) == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tflite", "executorch"])
def test_other_runtimes_take_two_inputs_and_give_two_outputs_in_order(tmp_path: Path, kind: str) -> None:
    script = tmp_path / "export.py"
    script.write_text(EXPORT)
    subprocess.run([sys.executable, script, kind, tmp_path / "model"], check=True, capture_output=True, timeout=300)
    np.save(tmp_path / "x.npy", np.full((2, 4), 0.5, np.float32))
    np.save(tmp_path / "ids.npy", np.array([[1, 2], [3, 4]], np.int64))
    inputs = [str(tmp_path / "x.npy"), str(tmp_path / "ids.npy")]
    events, done = call(ask_infer(tmp_path / "model", format=kind, inputs=inputs))
    assert done.returncode == 0, events
    for position, expected in enumerate(("y", "z")):
        got = np.load(tmp_path / f"out.{position}.npy")
        np.testing.assert_allclose(got, np.load(tmp_path / f"{expected}.npy"), rtol=1e-5)
    events, done = call(ask_measure(tmp_path / "model", format=kind, inputs=inputs))
    assert len(find(events, "samples")["ns"]) >= 20
    (tmp_path / "cut").write_bytes((tmp_path / "model").read_bytes()[:500])
    events, _ = call(ask_infer(tmp_path / "model", format=kind, inputs=inputs, artifact=str(tmp_path / "cut")))
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
    events, done = call({**request, "command": "load"})
    assert done.returncode == 0, events
    assert [event["event"] for event in events] == ["hello", "opened", "loaded", "done"]
    assert events[2]["load_ns"] > 0
    assert events[2]["rss_bytes"] >= events[1]["rss_bytes"] > 0


def test_a_profile_tells_every_operator_of_every_inference_and_leaves_nothing(model: Path) -> None:
    before = sorted(model.parent.iterdir())
    request = {key: value for key, value in ask_infer(model).items() if key != "output"}
    events, done = call({**request, "command": "profile", "runs": 7})
    assert done.returncode == 0, events
    told = find(events, "profiled")
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


def test_hung_up_before_the_first_word_is_an_end(model: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([sys.executable, AGENT, json.dumps(ask_infer(model))], stdout=writing, stderr=-3)
    os.close(writing)
    deadline = time.monotonic() + 30
    while process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.returncode != 0


def test_the_packed_agent_is_the_same_every_time() -> None:
    assert pack_agent() == pack_agent() == AGENT.read_bytes()


def test_a_damaged_packed_agent_is_written_anew() -> None:
    whole = AGENT.read_bytes()
    AGENT.write_bytes(b"damaged")
    find_agent.cache_clear()
    assert find_agent().read_bytes() == whole
