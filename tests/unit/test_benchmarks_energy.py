"""Energy per inference: a known trace comes back, its bounds hold the truth, and what cannot be told is refused."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from rankship_benchmarks.energy import EnergyReading, Window, read_energy
from rankship_pipeline.errors import MeasurementError, TraceGap
from rankship_targets.trace import Gap, PowerTrace, Provenance, Rail

S = 1_000_000_000
IDLE_UW, BUSY_UW, INFERENCES = 2_300_000, 5_100_000, 4_000
IDLE = (Window(start_ns=1 * S, end_ns=12 * S), Window(start_ns=80 * S, end_ns=91 * S))
BUSY = tuple(
    Window(start_ns=(14 + 13 * place) * S, end_ns=(25 + 13 * place) * S, inferences=INFERENCES) for place in range(5)
)
TOTAL_NJ = BUSY_UW * 11 * S / 1e6 / INFERENCES
MARGINAL_NJ = (BUSY_UW - IDLE_UW) * 11 * S / 1e6 / INFERENCES


def power_at(seconds: np.ndarray, drift_uw: float = 0, busy_uw: float = BUSY_UW) -> np.ndarray:
    """Busy a second longer than each window on both sides; the idle power rises evenly by `drift_uw` from 0 to 92 s."""
    powers = np.full(seconds.shape, float(IDLE_UW))
    for one in BUSY:
        powers[(seconds >= one.start_ns / S - 1) & (seconds <= one.end_ns / S + 1)] = busy_uw
    return powers + drift_uw * seconds / 92


def make_rail(
    powers: np.ndarray, period_ns: int, *, counter: bool = False, step: int = 1_000, name: str = "cpu"
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


def make_trace(rail: Rail, provenance: Provenance = "measured") -> PowerTrace:
    return PowerTrace(meter="test", provenance=provenance, clock="monotonic", period_ns=None, rails=(rail,))


def check_closes(reading: EnergyReading) -> None:
    for found, truth in ((reading.total, TOTAL_NJ), (reading.marginal, MARGINAL_NJ)):
        assert found is not None
        assert abs(found.value_nj - truth) <= 0.01 * truth


@pytest.mark.parametrize("counter", [False, True])
@pytest.mark.parametrize("period_ns", [2_000_000, 32_000_000, 100_000_000])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_known_power_comes_back_within_1_percent(period_ns: int, noise: float, *, counter: bool) -> None:
    random = np.random.default_rng(1)
    seconds = np.arange(0, 92 * S, period_ns) / S
    noisy = power_at(seconds) * random.normal(1, noise, seconds.size)
    reading = read_energy(make_trace(make_rail(noisy, period_ns, counter=counter)), "cpu", IDLE, BUSY)
    check_closes(reading)
    if not noise:
        assert abs(reading.total.value_nj - TOTAL_NJ) <= reading.total.uncertainty_nj
    assert (reading.provenance, reading.refused) == ("measured", None)
    assert reading.idle_uw == pytest.approx(IDLE_UW, rel=0.01)


def test_an_idle_that_drifts_evenly_widens_the_bound_and_stays_true() -> None:
    period_ns = 10_000_000
    seconds = np.arange(0, 92 * S, period_ns) / S
    steady = read_energy(make_trace(make_rail(power_at(seconds), period_ns)), "cpu", IDLE, BUSY)
    drifting = read_energy(make_trace(make_rail(power_at(seconds, 200_000), period_ns)), "cpu", IDLE, BUSY)
    assert steady.marginal is not None
    assert drifting.marginal is not None
    assert drifting.idle_drift_uw == pytest.approx(200_000 * 79 / 92, rel=0.02)
    assert (
        drifting.marginal.bound_nj > steady.marginal.bound_nj + 0.4 * drifting.idle_drift_uw * 11 * S / 1e6 / INFERENCES
    )
    assert abs(drifting.marginal.value_nj - MARGINAL_NJ) <= drifting.marginal.uncertainty_nj


def test_a_gain_that_is_off_lies_within_its_calibration() -> None:
    period_ns = 10_000_000
    seconds = np.arange(0, 92 * S, period_ns) / S
    trace = make_trace(make_rail(1.02 * power_at(seconds), period_ns))
    for found, truth in (
        (read_energy(trace, "cpu", IDLE, BUSY, 25_000).total, TOTAL_NJ),
        (read_energy(trace, "cpu", IDLE, BUSY, 25_000).marginal, MARGINAL_NJ),
    ):
        assert found is not None
        assert abs(found.value_nj - truth) <= found.uncertainty_nj
    assert abs(read_energy(trace, "cpu", IDLE, BUSY).total.value_nj - TOTAL_NJ) > 0.015 * TOTAL_NJ


def test_where_idle_and_busy_overlap_there_is_a_total_and_no_marginal() -> None:
    period_ns = 1 * S  # so slow, and a step so coarse, that 60 mW cannot be told
    seconds = np.arange(0, 93 * S, period_ns) / S
    rail = make_rail(power_at(seconds, busy_uw=IDLE_UW + 60_000), period_ns, step=500_000)
    reading = read_energy(make_trace(rail, "counter"), "cpu", IDLE, BUSY)
    assert reading.marginal is None
    assert reading.refused is not None
    assert "overlap" in reading.refused
    assert reading.total.value_nj > 0


SECONDS = np.arange(0, 92 * S, 10_000_000) / S
TRACE = make_trace(make_rail(power_at(SECONDS), 10_000_000))


@pytest.mark.parametrize(
    ("idle", "busy", "message"),
    [
        (IDLE, BUSY[:4], "4 busy windows, 5 are the fewest"),
        (IDLE, (*BUSY[:4], replace(BUSY[4], end_ns=BUSY[4].start_ns + 9 * S)), r"a window lasts 9\.0 s"),
        ((IDLE[1], IDLE[0]), BUSY, "overlap or are out of order"),
        (IDLE, (*BUSY[:4], replace(BUSY[4], start_ns=BUSY[3].end_ns - 1)), "overlap or are out of order"),
        (IDLE, (*BUSY[:4], replace(BUSY[4], inferences=0)), "a busy window has no inference"),
    ],
)
def test_windows_that_support_no_figure_are_refused(
    idle: tuple[Window, Window], busy: tuple[Window, ...], message: str
) -> None:
    with pytest.raises(MeasurementError, match=message):
        read_energy(TRACE, "cpu", idle, busy)


def test_a_gap_in_a_window_is_refused_and_one_between_windows_is_not() -> None:
    rail = TRACE.rails[0]
    inside = replace(rail, gaps=(Gap(start_ns=20 * S, end_ns=21 * S, why="missed"),))
    between = replace(rail, gaps=(Gap(start_ns=12 * S, end_ns=13 * S, why="missed"),))
    with pytest.raises(TraceGap, match="inside the window"):
        read_energy(make_trace(inside), "cpu", IDLE, BUSY)
    check_closes(read_energy(make_trace(between), "cpu", IDLE, BUSY))
    with pytest.raises(MeasurementError, match="no rail 'gpu'"):
        read_energy(TRACE, "gpu", IDLE, BUSY)


def test_the_windows_of_this_test_are_apart() -> None:
    assert all(before.end_ns < after.start_ns for before, after in pairwise([IDLE[0], *BUSY, IDLE[1]]))
