"""When files are exported by processes of their own, and how what fails in one comes home."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.export.apart import Job, choose_workers, export_apart, save_graph
from rankship_pipeline.export.artifact import export_file
from rankship_pipeline.export.graph import trace_graph
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BuildError, InputError, UnsupportedOp

GIB = 2**30
LONG = [25.0, 25.0, 22.0, 22.0, 4.0, 4.0]  # CPU seconds: a segmentation network and its factors, in three formats


@pytest.mark.parametrize(
    ("costs_s", "weights_bytes", "cores", "free_bytes", "workers"),
    [
        (LONG, 10**7, 6, 32 * GIB, 6),
        (LONG, 10**7, 2, 32 * GIB, 1),  # two starts at once take what they save
        (LONG, 10**7, 3, 32 * GIB, 3),
        (LONG, 10**7, 1, 32 * GIB, 1),
        (LONG, 10**7, 6, 2 * GIB, 1),  # room for one process only
        (LONG, 10**9, 6, 32 * GIB, 3),
        (LONG[:1], 10**7, 6, 32 * GIB, 1),
        ([0.5] * 6, 10**7, 6, 32 * GIB, 1),  # the imports cost more than the exports
        ([25.0, 0.1], 10**7, 2, 32 * GIB, 1),  # the long one alone takes as long as both
        ([], 0, 6, 32 * GIB, 1),
    ],
)
def test_files_get_processes_where_these_end_sooner_and_have_memory(
    costs_s: Sequence[float], weights_bytes: int, cores: int, free_bytes: int, workers: int
) -> None:
    assert choose_workers(costs_s, weights_bytes, cores, free_bytes) == workers


class Sines(nn.Module):
    """Calls an operator that this process alone knows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.rankship_test.sine(x)  # type: ignore[no-any-return]


def test_a_graph_with_operators_of_the_models_own_is_not_saved(tmp_path: Path) -> None:
    with torch.library._scoped_library("rankship_test", "DEF") as library:
        library.define("sine(Tensor x) -> Tensor")
        library.impl("sine", torch.sin, "CPU")
        library.impl("sine", torch.sin, "Meta")
        assert not save_graph(trace_graph(Sines(), (torch.zeros(1, 4),)), tmp_path / "graph.pt2")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """A saved linear layer, twice to ONNX."""
    graph = tmp_path / "graph.pt2"
    assert save_graph(trace_graph(nn.Linear(4, 3), (torch.zeros(1, 4),)), graph)
    return [Job(title=name, graph=graph, format_="onnx", file=tmp_path / f"{name}.onnx") for name in ("dense", "small")]


def test_a_file_is_the_same_from_a_process_of_its_own(
    jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = torch.export.load(jobs[0].graph)
    export_file(graph, "onnx", tmp_path / "here.onnx")
    assert list(export_apart(jobs[:1], 1, 1, Steps())) == jobs[:1]
    assert jobs[0].file.read_bytes() == (tmp_path / "here.onnx").read_bytes()
    assert onnx.load(jobs[0].file).graph.node[0].op_type == "Gemm"
    assert "dense: export to onnx" in capsys.readouterr().err


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Let a line of Python run in place of an export, with the job's paths in `sys.argv`; returns what was started."""
    started = list[Any]()
    popen = subprocess.Popen

    def replace(line: str) -> list[Any]:
        def start(words: list[Any], **named: Any) -> Any:  # noqa: ANN401 - as subprocess.Popen
            started.append(popen([sys.executable, "-c", line, *words[-4:]], **named))
            return started[-1]

        monkeypatch.setattr(subprocess, "Popen", start)
        return started

    return replace


@pytest.mark.parametrize("kind", [UnsupportedOp, InputError])
def test_an_error_comes_home_as_itself_with_what_was_printed(
    jobs: list[Job],
    stand_in: Callable[[str], list[Any]],
    kind: type[BuildError | InputError],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in(
        "import sys; print('the operator'); open(sys.argv[4], 'w').write("
        f"""'{{"kind": "{kind.__name__}", "message": "no such operator", "hint": "leave it out"}}'); sys.exit(3)"""
    )
    with pytest.raises(kind, match="no such operator") as failure:
        list(export_apart(jobs[:1], 1, 1, Steps()))
    assert failure.value.hint == "leave it out"
    said = capsys.readouterr().err
    assert "the operator" in said
    assert "✓" not in said


def test_a_process_that_dies_is_named_and_the_others_end(jobs: list[Job], stand_in: Callable[[str], list[Any]]) -> None:
    started = stand_in("import os, sys, time; os.kill(os.getpid(), 9) if 'dense' in sys.argv[3] else time.sleep(600)")
    with pytest.raises(BuildError, match="exports dense to onnx was ended by SIGKILL"):
        list(export_apart(jobs, 2, 1, Steps()))
    assert [one.returncode for one in started] == [-signal.SIGKILL] * 2


def test_an_interruption_ends_every_process(
    jobs: list[Job], stand_in: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    started = stand_in("import time; time.sleep(600)")
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(export_apart(jobs, 2, 1, Steps()))
    for one in started:
        with pytest.raises(ProcessLookupError):
            os.kill(one.pid, 0)


def test_no_more_processes_run_at_once_than_were_asked_for(
    jobs: list[Job], stand_in: Callable[[str], list[Any]]
) -> None:
    started = stand_in("pass")
    for count, _ in enumerate(export_apart(jobs, 1, 1, Steps()), 1):
        assert len(started) == count
