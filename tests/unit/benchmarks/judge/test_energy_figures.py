"""Energy from a bundle to the report, between runs and in a table: what is shown, and what is said instead."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from make.bundles import keep
from make.power import BASE, ENERGY_PLAN, ROUNDS, TRUE_MARGINAL_NJ, TRUE_NJ, make_metered, watch, watch_trial
from rankship_benchmarks.bundle.bundle import (
    BUNDLE_FILE,
    Bundle,
    open_bundle,
)
from rankship_benchmarks.bundle.suite import EnergyChoice, read_suite
from rankship_benchmarks.index.frames import write_frame
from rankship_benchmarks.judge.compare_energy import compare_energies
from rankship_benchmarks.judge.energy_figures import CaseEnergy
from rankship_benchmarks.judge.summary import Summary, summarise
from rankship_benchmarks.report.energy_words import print_energy, show_energy
from rankship_benchmarks.report.page import render_report
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.errors import InputError
from rankship_targets.trials.trace import Gap
from rankship_targets.trials.trial import MeteredTrial


def find_energy(bundle: Bundle, variant: str = "dense") -> CaseEnergy:
    (result,) = [one for one in summarise(bundle).results if (one.key.variant, one.key.format) == (variant, "onnx")]
    assert result.energy is not None
    return result.energy


def render(summary: Summary) -> str:
    stream = io.StringIO()
    print_energy(summary, Console(file=stream, width=200))
    return stream.getvalue()


def test_known_powers_come_back_from_disk_within_1_percent(tmp_path: Path) -> None:
    bundle = make_metered()
    read = open_bundle(keep(tmp_path / "run", bundle))
    assert read == bundle
    for variant, truth in TRUE_NJ.items():
        energy = find_energy(read, variant)
        assert energy.refused == ()
        for found, true_nj in ((energy.total, truth), (energy.marginal, TRUE_MARGINAL_NJ[variant])):
            assert found is not None
            assert abs(found.value_nj - true_nj) <= min(0.01 * true_nj, found.uncertainty_nj)
            assert found.rounds == ROUNDS
        assert (energy.meter, energy.provenance, energy.rails) == ("test", "measured", ("cpu",))
    ratio = find_energy(read, "compressed").ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(3.7 / 5.1, rel=0.01)
    assert ratio.low is not None


def test_table_and_page_show_energies_with_the_meters_provenance() -> None:
    bundle = make_metered()
    summary = summarise(bundle)
    assert summary.energy_note == ""
    said, page = render(summary), render_report(bundle)
    total = find_energy(bundle).total
    assert total is not None
    for text in (said, page):
        assert show_energy(total) in text
        assert "measured by a sensor or meter" in text
        assert "No energy figure" not in text
    modelled = render(summarise(make_metered(provenance="modelled")))
    assert "modelled from utilisation, not measured" in modelled


def test_a_run_without_a_meter_says_so_and_old_bundles_still_read(tmp_path: Path) -> None:
    folder = keep(tmp_path / "run", BASE)
    lines = [json.loads(line) for line in (folder / BUNDLE_FILE).read_text().splitlines()]
    del lines[0]["energy"], lines[-1]["metered"]
    for line in lines[1:-1]:  # as releases wrote it that knew no energy
        del line["loop"], line["idle"]
    (folder / BUNDLE_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = summarise(open_bundle(folder))
    assert all(one.energy is None for one in summary.results)
    assert "No energy figure: the suite asks for none." in render(summary)
    assert "No energy figure: the suite asks for none." in render_report(open_bundle(folder))
    waiting = summarise(replace(BASE, header=replace(BASE.header, energy=ENERGY_PLAN)))
    assert "have not run yet" in render(waiting)


def alter(bundle: Bundle, numbers: Sequence[int], change: Callable[[MeteredTrial], MeteredTrial]) -> Bundle:
    changed = tuple(change(one) if one.trial.round in numbers else one for one in bundle.metered)
    return replace(bundle, metered=changed)


def cut(one: MeteredTrial) -> MeteredTrial:
    gap = Gap(start_ns=20 * 10**9, end_ns=21 * 10**9, why="missed")
    return watch(replace(one.trace.rails[0], gaps=(gap,)), trial=one.trial)


def throttle(one: MeteredTrial) -> MeteredTrial:
    hot = replace(one.trial, after=replace(one.trial.after, throttled_bits=0b100))
    return replace(one, trial=hot)


@pytest.mark.parametrize(
    ("numbers", "change", "reason"),
    [
        ((2,), cut, "round 2 not counted: trace gap: rail cpu was missed"),
        ((2,), throttle, "round 2 not counted: throttled while it was measured"),
        ((2, 4), cut, "4 rounds count, at least 5 are needed"),
        ((0, 2), throttle, "4 rounds count, at least 5 are needed"),
    ],
)
def test_rounds_that_must_not_count_are_named_and_too_few_give_no_figure(
    numbers: tuple[int, ...], change: Callable[[MeteredTrial], MeteredTrial], reason: str
) -> None:
    bundle = alter(make_metered(), numbers, change)
    energy = find_energy(bundle)
    assert (energy.total is None) == (len(numbers) > 1)
    assert any(reason in one for one in energy.refused)
    assert reason in render(summarise(bundle))


def test_two_meters_in_one_run_give_no_figure() -> None:
    bundle = alter(make_metered(), (3,), lambda one: replace(one, trace=replace(one.trace, provenance="modelled")))
    energy = find_energy(bundle)
    assert energy.total is None
    assert energy.refused == ("more than one meter read this run: test, test",)


def test_an_overlap_in_one_round_refuses_the_marginal_figure_alone() -> None:
    bundle = alter(make_metered(), (1,), lambda one: watch_trial(one.trial, 1, 2_300_100))
    energy = find_energy(bundle)
    assert energy.total is not None
    assert energy.marginal is None
    assert "no marginal figure: in round 1 busy 2300" in energy.refused[0]


def test_a_stated_calibration_widens_both_figures() -> None:
    bundle = make_metered()
    header = replace(bundle.header, energy=replace(ENERGY_PLAN, calibration_ppm=20_000))
    plain, wide = find_energy(bundle), find_energy(replace(bundle, header=header))
    for before, after in ((plain.total, wide.total), (plain.marginal, wide.marginal)):
        assert before is not None
        assert after is not None
        assert after.bound_nj - before.bound_nj == pytest.approx(0.02 * before.value_nj, rel=0.02)


def test_a_trace_that_is_not_the_one_that_was_written_is_damage(tmp_path: Path) -> None:
    folder = keep(tmp_path / "run", make_metered())
    text = (folder / BUNDLE_FILE).read_text()
    (folder / BUNDLE_FILE).write_text(text.replace('"gaps":[]', '"gaps":[{"end_ns":1,"start_ns":0,"why":"reset"}]', 1))
    with pytest.raises(InputError, match="does not have the hash recorded beside it"):
        open_bundle(folder)


@pytest.mark.parametrize(("factor", "word"), [(1.05, "worse"), (0.95, "better"), (1.0, "same")])
def test_energies_of_two_runs_get_their_own_verdicts(factor: float, word: str) -> None:
    verdicts = compare_energies(make_metered(), make_metered(factor=factor, seed=5))
    assert [(one.key.variant, one.verdict, one.figure) for one in verdicts] == [
        ("dense", word, "energy"),
        ("compressed", word, "energy"),
    ]
    assert compare_energies(make_metered(), BASE) == ()


def test_energies_known_in_unlike_ways_are_not_compared() -> None:
    (one, _) = compare_energies(make_metered(), make_metered(provenance="counter"))
    assert (one.verdict, one.ratio) == ("unknown", None)
    assert one.reason == "energy was measured differently: meter was test (measured), is test (counter)"
    longer = make_metered()
    plan = replace(ENERGY_PLAN, choice=EnergyChoice(rounds=ROUNDS, busy_ms=20_000))
    (one, _) = compare_energies(make_metered(), replace(longer, header=replace(longer.header, energy=plan)))
    assert "loop was 10000 ms" in one.reason


def test_compare_prints_energy_beside_time_and_its_status_counts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [keep(tmp_path / name, make_metered(factor=factor)) for name, factor in (("a", 1.0), ("b", 1.1))]
    assert main(["compare", *map(str, folders)]) == 1
    said = capsys.readouterr().out
    assert "energy vs baseline" in said
    assert "time vs baseline" in said


def test_rows_of_energy_say_what_the_meter_said(tmp_path: Path) -> None:
    bundle = alter(make_metered(), (2,), cut)
    folder = keep(tmp_path / "run", bundle)
    assert write_frame([folder], "energy", tmp_path / "energy.csv") == 2 * ROUNDS
    with (tmp_path / "energy.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["meter"] for row in rows} == {"test"}
    good = [float(row["total_nj"]) for row in rows if row["variant"] == "dense" and row["valid"] == "True"]
    assert np.mean(good) == pytest.approx(TRUE_NJ["dense"], rel=0.01)
    assert [row["trusted"] for row in rows] == [row["valid"] for row in rows]  # nothing here is doubted
    (gap,) = [row for row in rows if row["variant"] == "dense" and row["round"] == "2"]
    assert (gap["total_nj"], gap["reasons"].partition(":")[0]) == ("", "trace gap")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("rounds = 4", "energy.rounds must be at least 5"),
        ("busy_ms = 999", "energy.busy_ms must be at least 1000"),
        ("busy_s = 9", "unknown key"),
    ],
)
def test_a_suites_energy_is_checked_when_it_is_read(tmp_path: Path, table: str, message: str) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text(f'recipe = "r.toml"\n[energy]\n{table}\n')
    with pytest.raises(InputError, match=message):
        read_suite(suite)
    suite.write_text('recipe = "r.toml"\n[energy]\n')
    assert read_suite(suite)[0].energy == EnergyChoice()
