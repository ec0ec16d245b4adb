"""The C++ program that runs ExecuTorch, built for this machine: it computes what the Python binding computes."""

import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from make.agents import call_agent
from rankship_pipeline.foundation.errors import AgentMismatch
from rankship_targets.client.etdump import read_etdump
from rankship_targets.kit.compile import pack_runner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="ExecuTorch's libraries are looked for as x86_64's"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here: apt-get install g++"),
]

EXPORT = """
import sys, pathlib, torch
from rankship_pipeline.export import executorch, keep_stdout_clean
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.table = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Embedding(7, 8)
        self.head = torch.nn.Linear(8, 5)
    def forward(self, x, ids):
        y = torch.relu(self.conv(x)).mean((2, 3)) + self.table(ids).mean(1)
        return self.head(y), y
torch.manual_seed(0)
graph = torch.export.export(Model().eval(), (torch.zeros(1, 3, 16, 16), torch.zeros(1, 2, dtype=torch.int64)))
executorch.export_graph(graph, pathlib.Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    subprocess.run([sys.executable, "-c", EXPORT, folder / "m.pte"], check=True, capture_output=True, timeout=300)
    random = np.random.default_rng(0)
    np.save(folder / "x.npy", random.normal(size=(4, 3, 16, 16)).astype(np.float32))
    np.save(folder / "ids.npy", random.integers(0, 7, size=(4, 2)))
    return folder / "m.pte"


def call(command: str, model: Path, runner: Path | None, **more: object) -> list[dict[str, Any]]:
    inputs = [str(model.with_name(name)) for name in ("x.npy", "ids.npy")]
    request: dict[str, object] = {"command": command, "format": "executorch", "artifact": str(model), "inputs": inputs}
    return call_agent({**request, "threads": 1, **more}, runner=runner)[0]


def test_it_computes_exactly_what_the_python_binding_computes(runner: Path, model: Path, tmp_path: Path) -> None:
    by_program = call("infer", model, runner, output=str(tmp_path / "a"))
    by_binding = call("infer", model, None, output=str(tmp_path / "b"))
    assert by_program[-1] == by_binding[-1] == {"event": "done", "outputs": 2}
    one, other = (events[1]["runtime"] for events in (by_program, by_binding))
    assert {name for name in other if one.get(name) != other[name]} == {"process", "binary_sha256"}
    assert (one["process"], other["process"]) == ("program", "python")
    assert len(one["binary_sha256"]) == len(other["binary_sha256"]) == 64
    for position in range(2):
        mine, theirs = (np.load(tmp_path / f"{name}.{position}.npy", allow_pickle=False) for name in "ab")
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
        assert len(np.unique(mine)) > 4  # samples differ


def test_it_measures_single_inferences_with_less_memory_than_python(runner: Path, model: Path) -> None:
    limits = {"min_samples": 25, "min_duration_ms": 2, "max_warmup_ms": 500}
    earliest_ns = time.monotonic_ns()  # the runner's clock must be the one that meters are read by
    events = {event["event"]: event for event in call("measure", model, runner, **limits)}
    assert len(events["samples"]["ns"]) >= 25
    assert sum(events["samples"]["ns"]) >= 1_000_000  # the loop itself takes a little
    began_ns, ended_ns = events["samples"]["start_ns"], events["samples"]["end_ns"]
    assert earliest_ns < began_ns < began_ns + sum(events["samples"]["ns"]) <= ended_ns < time.monotonic_ns()
    assert min(events["samples"]["ns"] + events["warmed"]["ns"]) > 0
    assert 0 < events["opened"]["rss_bytes"] <= events["warmed"]["peak_rss_bytes"] < 100_000_000
    assert events["loaded"]["load_ns"] > 0
    spent = call("measure", model, runner, **{**limits, "max_warmup_ms": 0})
    assert [event["steady"] for event in spent if event["event"] == "warmed"] == [False]


def test_damaged_programs_and_wrong_inputs_are_told_apart(runner: Path, model: Path, tmp_path: Path) -> None:
    whole = model.read_bytes()
    for name, content in (
        ("cut", whole[:500]),
        ("half", whole[: len(whole) // 2]),
        ("empty", b""),
        ("text", b"x" * 99),
    ):
        (tmp_path / name).write_bytes(content)
    output = str(tmp_path / "out")
    for name in ("cut", "half", "empty", "text", "absent"):
        last = call("infer", model, runner, artifact=str(tmp_path / name), output=output)[-1]
        assert last["kind"] == "bad_artifact", (name, last)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.ones((4, 3, 16, 16), np.float32)))
    np.save(tmp_path / "three.npy", np.ones((3, 3, 16, 16), np.float32))
    np.save(tmp_path / "none.npy", np.ones((0, 3, 16, 16), np.float32))
    np.save(tmp_path / "scalar.npy", np.float32(1))
    np.save(tmp_path / "complex.npy", np.ones((4, 3, 16, 16), np.complex64))
    np.save(tmp_path / "pickled.npy", np.array([object()]), allow_pickle=True)
    (tmp_path / "short.npy").write_bytes(model.with_name("x.npy").read_bytes()[:-1])
    (tmp_path / "header.npy").write_bytes(model.with_name("x.npy").read_bytes()[:20])
    (tmp_path / "text.npy").write_text("no array")
    ids = str(model.with_name("ids.npy"))
    for name in ("fortran", "three", "none", "scalar", "complex", "pickled", "short", "header", "text", "absent"):
        last = call("infer", model, runner, inputs=[str(tmp_path / f"{name}.npy"), ids], output=output)[-1]
        assert last["kind"] == "bad_input", (name, last)
    for inputs in ([], [ids], [ids, ids, ids]):
        assert call("infer", model, runner, inputs=inputs, output=output)[-1]["kind"] == "bad_input"
    assert call("infer", model, runner, inputs=[ids, ids], output=output)[-1]["kind"] == "failed"


def test_a_trace_tells_every_operator_inside_the_delegate(runner: Path, model: Path, tmp_path: Path) -> None:
    inputs = [model.with_name("x.npy"), model.with_name("ids.npy")]
    argv: list[str | Path] = [
        runner,
        "infer",
        "--etdump",
        tmp_path / "trace",
        "--output",
        tmp_path / "out",
        "--",
        model,
        *inputs,
    ]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    code = (
        "import sys; from executorch.devtools import Inspector; "
        "print([event.name for block in Inspector(etdump_path=sys.argv[1]).event_blocks for event in block.events])"
    )
    said = subprocess.run([sys.executable, "-c", code, tmp_path / "trace"], capture_output=True, text=True, check=True)
    assert "Convolution" in said.stdout


def test_its_profile_is_read_on_the_host_and_leaves_nothing_there(runner: Path, model: Path) -> None:
    before = sorted(model.parent.iterdir())
    events = {event["event"]: event for event in call("profile", model, runner, runs=5)}
    assert sorted(model.parent.iterdir()) == before
    assert events["opened"]["runtime"]["name"] == "executorch"
    found = read_etdump(events["traced"]["etdump"], 5)
    by_binding = {event["event"]: event for event in call("profile", model, None, runs=5)}["profiled"]
    assert [one.kind for one in found.operators] == [one["kind"] for one in by_binding["operators"]]
    assert any("Convolution" in one.kind for one in found.operators)
    assert {len(one.ns) for one in found.operators} == {5}
    operators_ns = [sum(one.ns[run] for one in found.operators) for run in range(5)]
    assert all(0 < told <= whole for told, whole in zip(operators_ns, found.inference_ns, strict=True))


def test_a_trace_of_too_few_inferences_is_refused(runner: Path, model: Path) -> None:
    events = {event["event"]: event for event in call("profile", model, runner, runs=1)}
    with pytest.raises(AgentMismatch, match="11 inferences, expected 12"):
        read_etdump(events["traced"]["etdump"], 12)


@pytest.mark.parametrize("text", ["", "?", "AAAA", "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo="])
def test_what_is_no_trace_is_refused(text: str) -> None:
    with pytest.raises(AgentMismatch, match="ETDump"):
        read_etdump(text, 1)


def test_wrong_words_are_refused_and_nothing_is_said_on_stdout(runner: Path, model: Path) -> None:
    for words in ([], ["dance"], ["load"], ["infer", str(model)], ["load", "--threads", "0", str(model)]):
        done = subprocess.run([runner, *words], capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert "usage" in done.stderr


def test_it_ends_when_nobody_listens(runner: Path, model: Path) -> None:
    inputs = [model.with_name("x.npy"), model.with_name("ids.npy")]
    argv: list[str | Path] = [runner, "measure", "--min-duration-ms", "600000", "--", model, *inputs]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        while b'"loaded"' not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        assert process.wait(timeout=30) == 3


def test_the_same_program_packs_into_the_same_bytes(runner: Path, tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        pack_runner(runner.parent, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
