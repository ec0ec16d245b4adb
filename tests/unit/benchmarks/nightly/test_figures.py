"""Energy, scores and tokens a second over the nights: what the index has, a gap where it has nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from make.artifacts import COMPRESSED, DENSE
from make.bundles import change_header, keep
from make.judged_runs import make_accuracy, make_run
from make.nights import make_device_night, make_night
from make.power import BASE, TRUE_NJ, make_metered
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.index.index import refresh_own_index
from rankship_benchmarks.nightly.figures import draw_rate, read_figures
from rankship_benchmarks.nightly.histories import Case, list_histories
from rankship_benchmarks.nightly.page import render_page
from rankship_benchmarks.nightly.records import NightRecord
from rankship_benchmarks.report.energy_words import energy_unit
from rankship_benchmarks.stats.steps import Night
from rankship_pipeline.foundation.artifact_key import DECODE


def keep_nights(results: Path, *runs: Bundle | None) -> list[NightRecord]:
    """One night for each run on its device; None is a night on which the device was away."""
    nights = []
    for number, run in enumerate(runs, start=1):
        device = next(one for one in runs if one is not None).header.device
        one = make_device_night(device, None)
        if run is None:
            one = replace(one, run=None, measured_on=None, gap="away")
        else:
            keep(results / str(number), run)
            one = replace(one, run=str(number))
        recipe = next(run for run in runs if run is not None).header.recipe
        nights.append(replace(make_night(number, [one]), recipe=recipe))
    return nights


def test_energies_are_drawn_with_their_bounds_and_a_night_without_one_is_a_gap(tmp_path: Path) -> None:
    nights = keep_nights(tmp_path, make_metered(), BASE, make_metered(factor=1.5, seed=4))
    engine = refresh_own_index(tmp_path)
    figures = read_figures(engine, nights)
    figure = figures.energies[Case(device=BASE.header.device, recipe=BASE.header.recipe, key=DENSE)]
    first, second, third = (one.level for one in figure.points)
    assert second is None
    assert first is not None
    assert third is not None
    assert first.low is not None
    assert first.low < first.value < (first.high or 0)
    assert third.value / first.value == pytest.approx(1.5, rel=0.01)
    divisor, unit = energy_unit(1.5 * TRUE_NJ["dense"])
    assert first.value * divisor == pytest.approx(TRUE_NJ["dense"], rel=0.01)
    assert figure.axis == f"energy of an inference ({unit})"
    page = render_page(nights[-1], nights, list_histories(engine, nights), figures)
    assert "onnx, dense: energy" in page
    assert "2 of 3 nights have it" in page


def test_scores_follow_the_build_whatever_it_was_measured_on(tmp_path: Path) -> None:
    good = make_run(rounds=3, layers=3, samples=11)
    build = good.header.build
    worse = replace(build, accuracies=(*build.accuracies[:-1], make_accuracy("compressed", 1800)))
    later = change_header(good, build=worse, run_id="two")
    figures = read_figures(refresh_own_index(tmp_path), nights := keep_nights(tmp_path, good, None, later))
    assert figures.scores == {}  # the index was not refreshed since
    figures = read_figures(refresh_own_index(tmp_path), nights)
    assert list(figures.scores) == ["dense", "compressed"]
    levels = [one.level for one in figures.scores["compressed"].points]
    assert [None if one is None else round(one.value, 1) for one in levels] == [95.9, 90.0]
    assert figures.scores["compressed"].axis == "accuracy (%)"
    assert figures.energies == {}
    page = render_page(nights[-1], nights, {}, figures)
    assert "<h2>Scores</h2>" in page
    assert "accuracy of the torch model behind the files" in page


def test_tokens_a_second_are_the_inverse_of_a_tokens_time() -> None:
    night = Night(run_id="1", started_utc="2026-01-01T00:00:00+00:00", rounds_ns=(5e7,) * 5 + (4e7,))
    gap = replace(night, run_id="2", rounds_ns=(), gap="throttled")
    rate = draw_rate([night, gap])
    assert [None if one.level is None else one.level.value for one in rate.points] == [20.0, None]
    level = rate.points[0].level
    assert level is not None
    assert (level.low, level.high) == (20.0, 25.0)
    case = Case(device="a", recipe="r", key=replace(COMPRESSED, part=DECODE))
    record = replace(make_night(1, [make_device_night("a", None)]), recipe="r")
    page = render_page(record, [record], {case: [night, gap]})
    assert "tokens a second" in page
    assert "tokens a second" not in render_page(record, [record], {replace(case, key=COMPRESSED): [night]})
