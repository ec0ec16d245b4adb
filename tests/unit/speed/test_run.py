"""Cases run in processes of their own, under a limit, and every row is kept."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest

from rankship_pipeline.foundation.errors import InputError
from speed import run
from speed.__main__ import main
from speed.records import Measured, make_figure, make_row, read_results
from speed.subjects import SUBJECTS


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_subject_has_a_function_that_takes_its_arguments(name: str) -> None:
    module, _, function = SUBJECTS[name].measure.partition(":")
    signature = inspect.signature(getattr(import_module(f"speed.{module}"), function))
    for case in SUBJECTS[name].cases.values():
        signature.bind(case.rounds, **case.arguments)


def test_a_row_is_kept_and_not_measured_twice_at_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "find_commit", lambda: "abc")
    monkeypatch.setattr("speed.records.find_commit", lambda: "abc")
    out = tmp_path / "now.json"
    said: list[str] = []
    results = run.run_cases(["allocation"], "small", out, said.append)
    (row,) = results.rows
    figures = {figure.name: figure for figure in row.measured.figures}
    processes, rounds = run.PROCESSES["small"], SUBJECTS["allocation"].cases["small"].rounds
    assert len(figures["ours_cpu_s"].samples) == processes * rounds
    assert max(figures["gap"].samples) <= 1e-9
    assert read_results(out) == results
    assert run.run_cases(["allocation"], "small", out, said.append) == results
    assert said[-1].startswith("allocation: measured at this commit")
    assert main(["compare", str(out), str(out)]) == 0
    assert main(["show", str(out)]) == 0
    assert "ours_cpu_s" in capsys.readouterr().out


def test_a_case_over_its_limit_has_a_row_that_says_so() -> None:
    assert run.run_process("allocation", "small", 0.01) == (None, "stopped after 0.01 s")


def test_what_a_case_lacks_is_named_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKSHIP_DATA", raising=False)
    measured, why = run.run_process("peers-convolutions", "full", 100)
    assert measured is None
    assert "RANKSHIP_DATA" in why


def test_an_unknown_subject_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="no subject 'nothing' of size small"):
        run.pick(["nothing"], "small")
    assert "stream-7b" not in run.pick([], "small")
    assert run.pick(["stream-7b"], "full") == ["stream-7b"]


def test_samples_of_two_processes_are_put_together() -> None:
    one, other = (Measured(figures=(make_figure("a", "s", samples, 0.1),)) for samples in ([1.0, 2.0], [3.0]))
    (figure,) = run.join([one, other]).figures
    assert (figure.samples, figure.value, figure.effect) == ((1.0, 2.0, 3.0), 2.0, 0.1)


def test_a_bar_is_met_or_missed_at_full_size_alone() -> None:
    figure = make_figure("ours_wall_s", "s", [2.0])
    row = make_row("allocation", "full", Measured(figures=(figure,)))
    assert run.judge_bar(row, figure) == "; bar ≤ 1: MISSED"
    assert run.judge_bar(row, make_figure("ours_wall_s", "s", [0.5])) == "; bar ≤ 1: met"
    assert not run.judge_bar(make_row("allocation", "small", row.measured), figure)
