"""Counts of instructions: read from callgrind's dumps, compared only with those of the same machine."""

from pathlib import Path

import pytest

from rankship_pipeline.foundation.errors import MeasurementError
from speed import instructions
from speed.counted import JOBS
from speed.instructions import compare_counts, count_all, find_lack, read_dumps
from speed.records import Measured, Results, describe_machine, make_figure, make_row, write_results

DUMP = "version: 1\ndesc: Trigger: dump {name}\nevents: Ir\nsummary: 7\n\nfn=(1)\n1 7\n\ntotals: {count}\n"


def test_dumps_are_read_in_their_order_and_the_end_of_the_process_is_none(tmp_path: Path) -> None:
    for number, (name, count) in enumerate([("b", 5), ("a", 7), ("a", 8)], 1):
        (tmp_path / f"callgrind.out.{number + 8}").write_text(DUMP.format(name=name, count=count))
    (tmp_path / "callgrind.out").write_text("desc: Trigger: Program termination\ntotals: 9\n")
    assert read_dumps(tmp_path) == {"b": [5], "a": [7, 8]}


def make_counts(count: int) -> Results:
    figure = make_figure("instructions", "instructions", [count], instructions.EFFECT)
    return Results(machine=describe_machine(1), rows=(make_row("a", "small", Measured(figures=(figure,))),))


def test_more_instructions_than_before_are_worse(tmp_path: Path) -> None:
    baseline = tmp_path / "then.json"
    said: list[str] = []
    assert compare_counts(baseline, make_counts(100), said.append) == ()
    assert said == [f"not compared: there are no counts at {baseline}"]
    write_results(baseline, make_counts(100))
    assert [one.verdict for one in compare_counts(baseline, make_counts(104), said.append)] == ["worse"]
    assert [one.verdict for one in compare_counts(baseline, make_counts(102), said.append)] == ["same"]
    write_results(baseline, Results(machine=describe_machine(7), rows=make_counts(100).rows))
    assert compare_counts(baseline, make_counts(200), said.append) == ()
    assert "threads 7 there, 1 here" in said[-1]


def test_where_valgrind_is_missing_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    assert find_lack() == "no valgrind and no callgrind_control here: apt-get install valgrind"


def test_a_failed_count_says_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "valgrind"
    failing.write_text("#!/bin/sh\necho 'no such tool' >&2\necho '==1== I refs: 0' >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(instructions, "VALGRIND", str(failing))
    with pytest.raises(MeasurementError, match="counting instructions failed: no such tool"):
        count_all(tmp_path / "out.json", lambda _text: None)


@pytest.mark.parametrize("name", JOBS)
def test_every_counted_job_runs(name: str) -> None:
    assert JOBS[name]()() is not None
