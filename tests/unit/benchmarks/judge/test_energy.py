"""Energy per inference: a known trace comes back, its bounds hold the truth, and what cannot be told is refused."""

from dataclasses import replace

import numpy as np
import pytest

from make.power import (
    IDLE_UW,
    INFERENCES,
    MARGINAL_NJ,
    MS,
    PLAN,
    SECONDS,
    TOTAL_NJ,
    TRIAL,
    S,
    make_rail,
    power_at,
    watch,
)
from rankship_benchmarks.judge.energy_round import RoundEnergy, read_round
from rankship_pipeline.foundation.errors import MeasurementError, TraceGap
from rankship_targets.trials.trace import Gap
from rankship_targets.trials.trial import MeteredTrial


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
        (watch(make_rail(power_at(SECONDS)), trial=TRIAL), "does not report when its timed loop ran"),
        (watch(make_rail(power_at(SECONDS)), clock="meter"), "uses the clock 'meter'"),
        (watch(make_rail(power_at(SECONDS[::50]), 500 * MS)), r"too few readings: 23 of rail cpu in 11\.0 s"),
        (watch(make_rail(power_at(SECONDS), step=4_000_000)), "resolution too coarse: the meter reads 4000 ± 2000 mW"),
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
    with pytest.raises(TraceGap, match="rail cpu covers 0 to"):
        read_round(watch(short), PLAN)
