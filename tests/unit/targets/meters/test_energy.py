"""Energy of a window against traces whose truth is known, and clocks that a chirp aligns."""

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankship_pipeline.foundation.errors import MeasurementError, TraceGap
from rankship_targets.meters.chirp import align_by_chirp
from rankship_targets.meters.integrate import integrate
from rankship_targets.meters.readings import build_rail
from rankship_targets.trials.trace import Channel, Rail

MS, NS = 1_000_000, 1_000_000_000


def make_power(rows: list[tuple[int, int | None]], resolution_uw: int = 1) -> Rail:
    return build_rail(Channel(name="r", unit="uW", resolution_uw=resolution_uw), rows, period_ns=10**12)


def test_a_straight_line_of_power_is_a_trapezoid() -> None:
    rail = make_power([(0, 0), (NS, 1_000_000), (2 * NS, 2_000_000)])
    assert integrate(rail, 0, 2 * NS).energy_uj == 2_000_000
    assert integrate(rail, NS // 2, 3 * NS // 2).energy_uj == 1_000_000


def test_quantisation_is_half_a_step_for_as_long_as_the_window() -> None:
    rail = make_power([(0, 3_000_000), (10 * NS, 3_000_000)], resolution_uw=20_000)
    found = integrate(rail, 0, 10 * NS)
    assert (found.energy_uj, found.quantisation_uj, found.sampling_uj) == (30_000_000, 100_001, 0)


def test_a_window_that_ends_before_it_starts_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="before it starts"):
        integrate(make_power([(0, 1), (NS, 1)]), 5, 5)


steps = st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 5000)), min_size=2, max_size=12)


@given(parts=steps, resolution_uw=st.integers(1, 500), chance=st.randoms(use_true_random=False), early=st.booleans())
def test_power_that_moves_one_way_between_samples_lies_within_the_bounds(
    *, parts: list[tuple[int, int]], resolution_uw: int, chance: random.Random, early: bool
) -> None:
    """The truth jumps from one sample's power to the next's right after the first, or right before the second."""
    instants, now = [], 0
    for width, _ in parts:
        instants.append(now * NS)
        now += width
    truth = [power for _, power in parts]
    shown = [round(power / resolution_uw) * resolution_uw for power in truth]
    rail = make_power(list(zip(instants, shown, strict=True)), resolution_uw)
    start_ns, end_ns = sorted(chance.sample(range(instants[-1] + 1), 2))
    true_uj = Fraction(0)
    for i in range(len(parts) - 1):
        overlap = max(0, min(instants[i + 1], end_ns) - max(instants[i], start_ns))
        true_uj += Fraction(overlap * truth[i + 1 if early else i], NS)
    found = integrate(rail, start_ns, end_ns)
    assert abs(found.energy_uj - true_uj) <= found.uncertainty_uj


@given(parts=steps, resolution_uj=st.integers(1, 300), chance=st.randoms(use_true_random=False), early=st.booleans())
def test_a_counter_that_moves_at_any_moment_between_readings_lies_within_the_bounds(
    *, parts: list[tuple[int, int]], resolution_uj: int, chance: random.Random, early: bool
) -> None:
    instants, energies, now, energy = list[int](), list[int](), 0, 0
    for width, more in parts:
        instants.append(now)
        energies.append(energy)
        now, energy = now + width, energy + more
    shown = [energy // resolution_uj * resolution_uj for energy in energies]
    channel = Channel(name="r", unit="uJ", resolution_uj=resolution_uj)
    rail = build_rail(channel, list(zip(instants, shown, strict=True)), period_ns=10**6)

    def read_truth(instant: int) -> int:
        place = max(i for i, at in enumerate(instants) if at <= instant)
        return energies[place + 1] if early and instants[place] < instant else energies[place]

    start_ns, end_ns = sorted(chance.sample(range(instants[-1] + 1), 2)) if instants[-1] > 0 else (0, 1)
    found = integrate(rail, start_ns, end_ns)
    assert abs(found.energy_uj - (read_truth(end_ns) - read_truth(start_ns))) <= found.uncertainty_uj


def test_a_value_that_is_late_by_its_lag_is_within_the_bounds() -> None:
    channel = Channel(name="r", unit="uJ", resolution_uj=1, lag_ns=32 * MS)
    rows: list[tuple[int, int | None]] = [(at, 3 * (at // (32 * MS) * 32)) for at in range(0, 10 * NS, 10 * MS)]
    rail = build_rail(channel, rows, period_ns=10 * MS)
    for start_ns in range(0, 100 * MS, 10 * MS):
        found = integrate(rail, start_ns, 9 * NS)
        assert abs(found.energy_uj - 3 * (9 * NS - start_ns) // MS) <= found.uncertainty_uj


def test_nothing_is_known_of_a_rail_without_samples() -> None:
    with pytest.raises(TraceGap, match="covers nothing"):
        integrate(make_power([(0, None)]), 0, 1)


EDGES = (50 * NS, 52 * NS, 53 * NS, 56 * NS)  # busy 2 s, idle 1 s, busy 3 s


def record_chirp(
    offset_ns: int, *, period_ns: int = 10 * MS, noise_uw: int = 100_000, edges: tuple[int, ...] = EDGES
) -> Rail:
    chance = random.Random(offset_ns)  # noqa: S311 - noise, no secret
    first = edges[0] + offset_ns - 10 * NS + chance.randrange(period_ns)
    rows: list[tuple[int, int | None]] = []
    for at in range(first, first + 30 * NS, period_ns):
        busy = sum(at - offset_ns >= edge for edge in edges) % 2
        rows.append((at, 2_000_000 + 1_500_000 * busy + chance.randint(-noise_uw, noise_uw)))
    return build_rail(Channel(name="r", unit="uW"), rows, period_ns=period_ns)


@pytest.mark.parametrize("offset_ns", [0, -45 * NS, 7 * NS + 123_456, 10**18 + 1])
def test_a_chirp_tells_the_offset_of_the_meters_clock(offset_ns: int) -> None:
    rail = record_chirp(offset_ns)
    found = align_by_chirp(rail, EDGES)
    assert abs(found.offset_ns - offset_ns) <= found.uncertainty_ns
    assert found.uncertainty_ns <= 11 * MS
    assert abs(found.edge_uw - 1_500_000) < 200_000


def test_a_counter_is_aligned_as_well() -> None:
    power = record_chirp(NS)
    energy, rows = 0, list[tuple[int, int | None]]()
    for at, value in zip(power.at_ns, power.power_uw or (), strict=True):
        energy += value // 100
        rows.append((at, energy))
    rail = build_rail(Channel(name="r", unit="uJ"), rows, period_ns=10 * MS)
    found = align_by_chirp(rail, EDGES)
    assert abs(found.offset_ns - NS) <= found.uncertainty_ns + 10 * MS


def test_a_trace_without_the_chirp_is_refused() -> None:
    chance = random.Random(1)  # noqa: S311 - as above
    noise: list[tuple[int, int | None]] = [
        (at, chance.randint(2_000_000, 2_500_000)) for at in range(0, 30 * NS, 10 * MS)
    ]
    with pytest.raises(MeasurementError):
        align_by_chirp(build_rail(Channel(name="r", unit="uW"), noise, period_ns=10 * MS), EDGES)
    flat: list[tuple[int, int | None]] = [(at, 2_000_000) for at in range(0, 30 * NS, 10 * MS)]
    with pytest.raises(MeasurementError, match="no chirp"):
        align_by_chirp(build_rail(Channel(name="r", unit="uW"), flat, period_ns=10 * MS), EDGES)


def test_a_chirp_that_fits_twice_is_refused() -> None:
    twice = (*EDGES, *(edge + 10 * NS for edge in EDGES))
    with pytest.raises(MeasurementError, match="two times"):
        align_by_chirp(record_chirp(0, edges=twice), EDGES)


def test_slow_samples_and_short_traces_are_refused() -> None:
    with pytest.raises(MeasurementError, match="apart"):
        align_by_chirp(record_chirp(0, period_ns=400 * MS), EDGES)
    with pytest.raises(TraceGap, match="shorter"):
        align_by_chirp(make_power([(i * MS, 1) for i in range(100)]), EDGES)
