"""Energy per inference: a known trace comes back, its bounds hold the truth, and what cannot be told is refused."""

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankship_benchmarks.bundle.suite import EnergyChoice, EnergyPlan
from rankship_benchmarks.judge.energy_round import RoundEnergy, read_round
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import MeasurementError, TraceGap
from rankship_targets.trials.trace import Gap, PowerTrace, Rail
from rankship_targets.trials.trial import MeteredTrial, Span, Trial

SAMPLE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "judge/test_summary.py"))
make_bundle: Callable[..., Any] = SAMPLE["make_bundle"]
TRIAL: Trial = make_bundle(rounds=1, layers=3).trials[0]

S, MS = 1_000_000_000, 1_000_000
IDLE_UW, BUSY_UW, INFERENCES = 2_300_000, 5_100_000, len(TRIAL.samples_ns)
LOOP = Span(start_ns=14 * S, end_ns=25 * S)
RESTS = (Span(start_ns=1 * S, end_ns=12 * S), Span(start_ns=27 * S, end_ns=38 * S))
WATCHED = replace(TRIAL, loop=LOOP, idle=RESTS)
TOTAL_NJ = BUSY_UW * 11 * S / 1e6 / INFERENCES
MARGINAL_NJ = (BUSY_UW - IDLE_UW) * 11 * S / 1e6 / INFERENCES
PLAN = EnergyPlan(choice=EnergyChoice(), meter="replay", period_us=10_000, rails=(), calibration_ppm=None)
SECONDS = np.arange(0, 40 * S, 10 * MS) / S


def power_at(seconds: np.ndarray, drift_uw: float = 0, busy_uw: float = BUSY_UW) -> np.ndarray:
    """Busy a second longer than the loop on both sides; the idle power rises evenly by `drift_uw` from 0 to 40 s."""
    powers = np.full(seconds.shape, float(IDLE_UW))
    powers[(seconds >= LOOP.start_ns / S - 1) & (seconds <= LOOP.end_ns / S + 1)] = busy_uw
    return powers + drift_uw * seconds / 40


def make_rail(
    powers: np.ndarray, period_ns: int = 10 * MS, *, counter: bool = False, step: int = 1_000, name: str = "cpu"
) -> Rail:
    at = tuple(int(n) * period_ns for n in range(len(powers)))
    if counter:
        energy = np.concatenate([[0], np.cumsum((powers[1:] + powers[:-1]) / 2 * period_ns / 1e9)])
        values, power = tuple(int(v) // step * step for v in energy), None
    else:
        values, power = None, tuple(round(v / step) * step for v in powers)
    return Rail(
        name=name,
        at_ns=at,
        power_uw=power,
        energy_uj=values,
        resolution_uw=None if counter else step,
        resolution_uj=step if counter else None,
        lag_ns=0,
        gaps=(),
        skipped=0,
    )


def watch(*rails: Rail, trial: Trial = WATCHED, **changes: object) -> MeteredTrial:
    trace = PowerTrace(meter="test", provenance="measured", clock="monotonic", period_ns=None, rails=rails)
    trace = replace(trace, **changes)  # type: ignore[arg-type]
    return MeteredTrial(trial=trial, trace=trace, trace_sha256=digest(trace))


def check_closes(reading: RoundEnergy) -> None:
    assert reading.overlap == ""
    for found, truth in ((reading.total, TOTAL_NJ), (reading.marginal, MARGINAL_NJ)):
        assert abs(found.value_nj - truth) <= 0.01 * truth


@pytest.mark.parametrize("counter", [False, True])
@pytest.mark.parametrize("period_ns", [2 * MS, 32 * MS, 100 * MS])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_known_power_comes_back_within_1_percent(period_ns: int, noise: float, *, counter: bool) -> None:
    random = np.random.default_rng(1)
    seconds = np.arange(0, 40 * S, period_ns) / S
    noisy = power_at(seconds) * random.normal(1, noise, seconds.size)
    reading = read_round(watch(make_rail(noisy, period_ns, counter=counter)), PLAN)
    check_closes(reading)
    if not noise:
        assert abs(reading.total.value_nj - TOTAL_NJ) <= reading.total.bound_nj
    assert reading.idle_uw == pytest.approx(IDLE_UW, rel=0.01)


def test_rails_are_added_up_and_only_those_that_were_named() -> None:
    powers = power_at(SECONDS)
    both = watch(make_rail(powers / 4, name="little"), make_rail(powers * 3 / 4, name="big"), make_rail(powers))
    check_closes(read_round(both, replace(PLAN, rails=("little", "big"))))
    with pytest.raises(MeasurementError, match="3 rails and none was chosen"):
        read_round(both, PLAN)
    with pytest.raises(MeasurementError, match="no rail 'gpu'"):
        read_round(both, replace(PLAN, rails=("gpu",)))


def test_an_idle_that_drifts_evenly_widens_the_bound_and_stays_true() -> None:
    steady = read_round(watch(make_rail(power_at(SECONDS))), PLAN)
    drifting = read_round(watch(make_rail(power_at(SECONDS, 200_000))), PLAN)
    assert drifting.idle_drift_uw == pytest.approx(200_000 * 26 / 40, rel=0.02)
    widened_nj = 0.4 * drifting.idle_drift_uw * 11 * S / 1e6 / INFERENCES
    assert drifting.marginal.bound_nj > steady.marginal.bound_nj + widened_nj
    assert abs(drifting.marginal.value_nj - MARGINAL_NJ) <= drifting.marginal.bound_nj


def test_where_idle_and_busy_overlap_the_marginal_figure_has_its_reason() -> None:
    rail = make_rail(power_at(SECONDS, busy_uw=IDLE_UW + 60_000), step=500_000)
    reading = read_round(watch(rail), PLAN)
    assert "overlap" in reading.overlap
    assert reading.total.value_nj > 0


@pytest.mark.parametrize(
    ("metered", "message"),
    [
        (watch(make_rail(power_at(SECONDS)), trial=TRIAL), "does not tell when its timed loop ran"),
        (watch(make_rail(power_at(SECONDS)), clock="meter"), "keeps the clock 'meter'"),
        (watch(make_rail(power_at(SECONDS[::50]), 500 * MS)), r"too few readings: 23 of rail cpu in 11\.0 s"),
        (watch(make_rail(power_at(SECONDS), step=4_000_000)), "resolution too coarse: the meter tells 4000 ± 2000 mW"),
        (watch(make_rail(0 * power_at(SECONDS))), "no power was drawn"),
    ],
)
def test_what_supports_no_figure_is_refused_by_name(metered: MeteredTrial, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        read_round(metered, PLAN)


def test_a_gap_in_a_window_is_refused_and_one_between_windows_is_not() -> None:
    rail = make_rail(power_at(SECONDS))
    inside = replace(rail, gaps=(Gap(start_ns=20 * S, end_ns=21 * S, why="missed"),))
    between = replace(rail, gaps=(Gap(start_ns=12 * S, end_ns=13 * S, why="missed"),))
    with pytest.raises(TraceGap, match="inside the window"):
        read_round(watch(inside), PLAN)
    check_closes(read_round(watch(between), PLAN))
    short = make_rail(power_at(SECONDS[: len(SECONDS) // 2]))
    with pytest.raises(TraceGap, match="rail cpu holds 0 to"):
        read_round(watch(short), PLAN)
