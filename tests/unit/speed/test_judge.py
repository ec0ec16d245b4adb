"""Two files of figures: what counts as slower, what is noise, and what is never compared."""

from dataclasses import replace

import pytest

from rankship_pipeline.foundation.errors import UnlikeConditions
from speed.judge import judge, list_lost
from speed.records import Machine, Measured, Results, Row, make_figure

MACHINE = Machine(processor="x", cores=2, memory_gib=15, threads=1, python="3.11.7", packages={"torch": "2.13.0"})
SPREAD = [1.0, 1.02, 0.99, 1.01, 0.98, 1.03, 1.0, 0.97, 1.01, 1.02]


def make_results(samples: list[float], effect: float | None = 0.1, kept: str = "0.5") -> Results:
    measured = Measured(figures=(make_figure("ours_cpu_s", "s", samples, effect),), parameters={"kept": kept})
    row = Row(subject="a", size="small", date_utc="x", commit="y", load_average=0.0, measured=measured)
    return Results(machine=MACHINE, rows=(row,))


def name_verdict(before: list[float], after: list[float]) -> str:
    (verdict,) = judge(make_results(before), make_results(after))
    return verdict.verdict


def test_many_samples_are_judged_by_the_rank_test() -> None:
    slower = [1.3 * one for one in SPREAD]
    assert name_verdict(SPREAD, slower) == "worse"
    assert name_verdict(slower, SPREAD) == "better"
    assert name_verdict(SPREAD, [1.05 * one for one in SPREAD]) == "same"
    (verdict,) = judge(make_results(SPREAD), make_results(slower))
    assert verdict.ratio == pytest.approx(1.3, rel=0.03)
    assert verdict.reason.startswith("p = ")


def test_few_samples_must_not_overlap() -> None:
    assert name_verdict([1.0, 1.1, 0.9], [1.5, 1.6, 1.4]) == "worse"
    assert name_verdict([1.0, 1.1, 2.9], [1.5, 1.6, 1.4]) == "unknown"
    assert name_verdict([1.0], [1.2]) == "worse"
    assert name_verdict([1.0], [1.05]) == "same"
    assert name_verdict([1.2], [1.0]) == "better"


def test_what_has_no_effect_or_other_parameters_is_not_compared() -> None:
    assert judge(make_results([1.0], None), make_results([2.0], None)) == ()
    assert judge(make_results([1.0], kept="0.5"), make_results([2.0], kept="0.6")) == ()
    assert judge(make_results([0.0]), make_results([2.0])) == ()


def test_two_machines_are_refused_by_what_differs() -> None:
    other = replace(make_results([1.0]), machine=replace(MACHINE, processor="z"))
    with pytest.raises(UnlikeConditions, match=r"then\.json is of another machine: processor x there, z here"):
        judge(make_results([1.0]), other, "then.json")
    assert len(judge(make_results([1.0]), other, but=("processor",))) == 1


def test_a_subject_that_no_longer_runs_is_named() -> None:
    before = make_results([1.0])
    after = Results(machine=MACHINE, rows=(replace(before.rows[0], measured=Measured(), stopped="stopped after 9 s"),))
    assert list_lost(before, before) == list_lost(after, after) == []
    assert list_lost(before, after) == ["a, small: stopped after 9 s"]
