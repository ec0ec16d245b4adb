"""The agent as the device runs it: a file, a request, lines of JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from make.agents import ask_infer, ask_measure, call_agent, find_event
from make.onnx_files import WEIGHT
from make.waiting import wait_until
from rankship_targets.agent import main, runtimes, system, timing
from rankship_targets.client.agent_file import find_agent, pack_agent

AGENT = find_agent()
SWEEP = {"command": "sweep", "format": "onnx", "threads": 1, "min_samples": 1, "min_duration_ms": 1, "max_warmup_ms": 1}


def test_infer_computes_every_sample_and_output(model: Path) -> None:
    events, done = call_agent(ask_infer(model))
    assert done.returncode == 0, done.stderr
    assert [event["event"] for event in events] == ["hello", "opened", "done"]
    assert events[-1]["outputs"] == 2
    assert events[1]["runtime"]["name"] == "onnxruntime"
    expected = np.load(model.parent / "x.npy") @ WEIGHT
    np.testing.assert_allclose(np.load(model.parent / "out.0.npy"), expected, rtol=1e-5)
    np.testing.assert_allclose(np.load(model.parent / "out.1.npy"), -expected, rtol=1e-5)


def test_measure_keeps_every_sample_and_its_conditions(model: Path) -> None:
    events, done = call_agent(ask_measure(model))
    assert done.returncode == 0, done.stderr
    samples, warmed = find_event(events, "samples")["ns"], find_event(events, "warmed")
    assert len(samples) >= 20
    assert sum(samples) > 0
    assert len(warmed["ns"]) >= timing.WINDOW_SAMPLES
    assert min(samples + warmed["ns"]) > 0
    assert find_event(events, "loaded")["load_ns"] > 0
    assert 0 < find_event(events, "opened")["rss_bytes"] <= warmed["peak_rss_bytes"]
    assert [event["when"] for event in events if event["event"] == "state"] == ["before", "after"]


def test_a_measurement_between_two_rests_tells_when_they_and_the_loop_were(model: Path) -> None:
    events, done = call_agent(ask_measure(model, idle_ms=30))
    assert done.returncode == 0, done.stderr
    names = [event["event"] for event in events]
    assert names[:4] == ["hello", "settled", "idle", "state"]
    assert names[-3:] == ["samples", "idle", "done"]
    before, after = (event for event in events if event["event"] == "idle")
    loop = find_event(events, "samples")
    assert [before["when"], after["when"]] == ["before", "after"]
    instants = [one[key] for one in (before, loop, after) for key in ("start_ns", "end_ns")]
    assert instants == sorted(instants)
    assert min(one["end_ns"] - one["start_ns"] for one in (before, after)) >= 30_000_000
    assert loop["end_ns"] - loop["start_ns"] >= sum(loop["ns"])


def test_peak_memory_is_not_the_parents(model: Path) -> None:
    ballast = np.ones(60_000_000)  # 480 MB here, which ru_maxrss of a child would show
    events, _ = call_agent(ask_measure(model))
    assert find_event(events, "warmed")["peak_rss_bytes"] < ballast.nbytes


def test_spent_warm_up_budget_is_told(model: Path) -> None:
    events, _ = call_agent(ask_measure(model, max_warmup_ms=0))
    assert find_event(events, "warmed")["steady"] is False


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
        (json.dumps({**SWEEP, "artifacts": ["a"], "inputs": [["x"]], "own": [{}, {}]}), "bad_request"),
        (json.dumps({**SWEEP, "artifacts": ["a"], "inputs": [["x"]], "own": [{"threads": 9}]}), "bad_request"),
        ('{"command": ["probe"]}', "bad_request"),
        ('{"command": "probe", "workdir": 3}', "bad_request"),
        ('{"command": "probe", "workdir": ".", "extra": 1}', "bad_request"),
        ('{"command": "probe", "workdir": "/no/such/folder"}', "failed"),
    ],
)
def test_wrong_requests_are_events(request_text: str, kind: str) -> None:
    events, done = call_agent(request_text)
    assert (events[0]["event"], events[-1]["event"], events[-1]["kind"]) == ("hello", "error", kind)
    assert done.returncode == 1


@pytest.mark.parametrize("command", [ask_infer, ask_measure])
def test_truncated_absent_and_empty_artifacts_are_bad(model: Path, command: Callable[..., dict[str, object]]) -> None:
    (model.parent / "cut").write_bytes(model.read_bytes()[:60])
    (model.parent / "empty").write_bytes(b"")
    for name in ("cut", "empty", "absent"):
        events, done = call_agent(command(model, artifact=str(model.parent / name)))
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
        events, _ = call_agent(ask_infer(model, inputs=[f"{folder}/{name}.npy" for name in inputs]))
        assert (events[-1]["event"], events[-1]["kind"]) == ("error", "bad_input"), (inputs, events)


def test_wrong_shape_is_the_runtimes_own_failure(model: Path) -> None:
    np.save(model.parent / "x.npy", np.ones((5, 9), np.float32))
    events, _ = call_agent(ask_infer(model))
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
    events, _ = call_agent(ask_infer(model), path=tmp_path / "site")
    assert events[-1]["kind"] == "lacks_runtime"
    assert "libfoo.so" in events[-1]["message"]


def test_runtime_that_prints_does_not_reach_the_protocol(model: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    noise = "import os\nprint('noise from python')\nos.write(1, b'noise from C\\n')\nraise SystemError('broken')\n"
    (tmp_path / "site/onnxruntime.py").write_text(noise)
    events, done = call_agent(ask_infer(model), path=tmp_path / "site")
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
        events, done = call_agent(ask_measure(model, cpus=[core], min_duration_ms=300))
    finally:
        hog.kill()
        hog.wait()
    assert done.returncode == 0, done.stderr
    samples = find_event(events, "samples")
    assert 0.01 * 300_000_000 < samples["waited_ns"] < samples["end_ns"] - samples["start_ns"]


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


def test_hung_up_before_the_first_word_is_an_end(model: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([sys.executable, AGENT, json.dumps(ask_infer(model))], stdout=writing, stderr=-3)
    os.close(writing)
    wait_until(lambda: process.poll() is not None, timeout_s=30)
    assert process.returncode != 0


def test_the_packed_agent_is_the_same_every_time() -> None:
    assert pack_agent() == pack_agent() == AGENT.read_bytes()


def test_a_damaged_packed_agent_is_written_anew() -> None:
    whole = AGENT.read_bytes()
    AGENT.write_bytes(b"damaged")
    find_agent.cache_clear()
    assert find_agent().read_bytes() == whole
