"""Cost tables: the mathematics against a world whose true costs are known, and the whole way on this machine."""

import io
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median

import pytest
from rich.console import Console

from make.devices import make_local, write_power_meter, write_rooted_python
from make.recipes import write_priced_recipe
from make.trials import UNTOLD
from make.trials import make_trial as make_like_trial
from rankship_benchmarks.bundle.suite import EnergyChoice, plan_energy
from rankship_benchmarks.costs import energy_table as energy_costs
from rankship_benchmarks.costs import time_table as costs
from rankship_benchmarks.costs.energy_table import Watched, collect_energies, find_model_uj, measure_energies, read_all
from rankship_benchmarks.costs.landing import refuse_foreign
from rankship_benchmarks.costs.runtime_on_device import Place, Subject, choose_place
from rankship_benchmarks.costs.sweeps import (
    COPIES,
    MODEL,
    Offer,
    Wanted,
    collect_times,
    find_model_ns,
    list_wanted,
    price_layer,
)
from rankship_benchmarks.costs.time_table import measure_costs
from rankship_benchmarks.costs.timings import Journal, Lines, Sweep, Timing
from rankship_benchmarks.stats.estimates import Estimate
from rankship_benchmarks.stats.staircase import find_gaps, keep_steps, pick_rungs, spread_positions
from rankship_benchmarks.verbs.costs import tabulate
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, MeasurementError, Throttled, UnlikeConditions
from rankship_pipeline.foundation.records import CostTable, Factors, LayerCost, Stored
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.ranks.call_sites import Site
from rankship_pipeline.recipe.rules import read_recipe
from rankship_targets.devices.device import Device
from rankship_targets.devices.meter_choice import MeterChoice
from rankship_targets.session.session import open_session
from rankship_targets.trials.trace import PowerTrace, Rail
from rankship_targets.trials.trial import MeteredTrial, Span, Trial

SITE = Site(
    kind="convolution", rows=16, columns=72, bias=False, input_shape=(1, 8, 8, 8), kernel=(3, 3), padding=(1, 1)
)


def make_trial(ns: float, sweep: int = 0, throttled_bits: int | None = None) -> Trial:
    after = replace(UNTOLD, throttled_bits=throttled_bits)
    return make_like_trial(round=sweep, samples_ns=(round(ns),) * 3, before=UNTOLD, after=after)


def make_world(options: dict[int, float], sweeps: int = 9, noise: float = 0.0) -> list[Timing]:
    """A model of 1 ms of which the layer takes 100 µs, calls cost 30 µs, and each sweep has a speed of its own.

    In int8 every layer takes a quarter, and 12 µs to round the input, which copies share.
    """
    random, others = Random(3), Random(4)  # noqa: S311 - not for secrets
    costs: dict[Precision, tuple[float, float]] = {"float32": (30_000.0, 100_000.0), "int8": (42_000.0, 25_000.0)}
    timings = []
    for sweep in range(sweeps):
        speed = random.uniform(0.5, 2)
        true = {MODEL: 1e6}
        for weights, (overhead, layer) in costs.items():
            dense = Stored(weights=weights)
            ways = {dense: 1.0, **{replace(dense, factors=Factors(rank=k)): ratio for k, ratio in options.items()}}
            true[str(Wanted(stored=dense, copies=1))] = overhead + layer
            true |= {str(way): overhead + COPIES * ratio * layer for way, ratio in ways.items()}
        for name, ns in true.items():
            draw = others if "int8" in name else random
            trial = make_trial(ns * speed * draw.gauss(1, noise), sweep)
            timings.append(Timing(sweep=sweep, site="" if name == MODEL else "s", subject=name, trial=trial))
    return timings


def at(value: float, spread: float = 0.01) -> Estimate:
    return Estimate(value=value, low=value - spread, high=value + spread, confidence=0.95, rounds=9)


def test_overhead_and_speed_cancel_and_true_costs_come_back() -> None:
    timings = make_world({8: 0.4, 16: 0.9})
    times = collect_times(timings, "s")
    assert times.share().value == pytest.approx(0.1, rel=1e-3)
    for rank, ratio in {8: 0.4, 16: 0.9}.items():
        found = times.ratio(Stored(factors=Factors(rank=rank)))
        assert found is not None
        assert found.value == pytest.approx(ratio, rel=1e-3)
    assert times.ratio(Stored(factors=Factors(rank=24))) is None


@pytest.mark.parametrize("border", [0, 12_000])
def test_a_layer_of_fewer_bits_has_an_overhead_of_its_own(border: int) -> None:
    times = collect_times(make_world({8: 0.4}), "s", rounds_inputs=border > 0)
    dense, factored = Stored(weights="int8"), Stored(factors=Factors(rank=8), weights="int8")
    for stored, true in {dense: 25_000, factored: 10_000}.items():
        found = times.ratio(stored)
        assert found is not None
        assert found.value == pytest.approx((true + border) / 100_000, rel=1e-3)
    alone = times.ratio(factored, "int8")
    assert alone is not None
    assert alone.value == pytest.approx((10_000 + border) / (25_000 + border), rel=1e-3)
    assert times.share().value == pytest.approx(0.1, rel=1e-3), "shares are of the layer in float32"


def test_what_is_wanted_of_a_site_holds_every_dense_layer_that_it_is_compared_with() -> None:
    ways = [Stored(factors=Factors(rank=4)), Stored(weights="int8"), Stored(factors=Factors(rank=4), weights="int4")]
    assert [str(one) for one in list_wanted(ways)] == [
        "dense once", "dense", "dense, int8 once", "dense, int8", "dense, int4 once", "dense, int4",
        "svd 4", "svd 4, int4",
    ]  # fmt: skip


def test_intervals_hold_the_truth_under_noise() -> None:
    times = collect_times(make_world({8: 0.4, 16: 0.7}, sweeps=25, noise=0.02), "s")
    for rank, ratio in {8: 0.4, 16: 0.7}.items():
        found = times.ratio(Stored(factors=Factors(rank=rank)))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low < ratio < found.high < 1


def test_what_was_throttled_counts_for_nothing() -> None:
    slow = Timing(sweep=0, site="", subject=MODEL, trial=make_trial(9e9, 0, throttled_bits=0b100))
    timings = [one for one in make_world({8: 0.4}) if (one.sweep, one.subject) != (0, MODEL)]
    assert collect_times([*timings, slow], "s").share().rounds == 8
    with pytest.raises(Throttled):
        find_model_ns([slow])
    with pytest.raises(Throttled):
        collect_times([slow], "s").share()


def test_a_layer_called_at_two_sites_costs_both_and_offers_what_both_do() -> None:
    other = replace(SITE, input_shape=(1, 8, 4, 4))
    shares = {SITE: at(0.2), other: at(0.1)}
    offers = {
        SITE: [Offer(stored=Stored(factors=Factors(rank=k)), ratio=at(0.5)) for k in (4, 8)],
        other: [Offer(stored=Stored(factors=Factors(rank=8)), ratio=at(0.8))],
    }
    dense, factored = price_layer((SITE, other), shares, offers, 1_000_000)
    assert (dense.factors, dense.cost, dense.low, dense.high) == (None, 300_000, 280_000, 320_000)
    assert (factored.factors, factored.cost) == (Factors(rank=8), 100_000 + 80_000)
    (alone,) = price_layer((SITE,), {SITE: at(-0.001)}, {}, 1_000_000)
    assert alone.cost == 1  # noise swallowed it; it still runs
    assert price_layer((), {}, {}, 1_000_000) == (LayerCost(factors=None, cost=0),)  # never called


def climb(rungs: int, true: dict[int, float], count: int = 5) -> tuple[list[int], set[int]]:
    """Measure a staircase as the passes do; gives what is offered and all that was measured."""
    passes: list[dict[int, Estimate]] = []
    while wanted := pick_rungs(rungs, passes, count):
        passes.append({place: at(max(ratio for edge, ratio in true.items() if edge <= place)) for place in wanted})
    measured = {place: ratio for one in passes for place, ratio in one.items()}
    return keep_steps(measured), set(measured)


def test_bisection_finds_every_edge_and_offers_only_the_last_rank_of_each_step() -> None:
    true = {0: 0.2, 16: 0.4, 33: 0.6, 50: 0.8, 57: 1.1}  # a step begins at each
    kept, measured = climb(64, true)
    assert kept == [15, 32, 49, 56]
    assert len(measured) < 30


def test_nothing_is_looked_for_where_every_rank_is_slower_than_dense() -> None:
    kept, measured = climb(64, {0: 1.05, 20: 1.2, 40: 1.5})
    assert kept == []
    assert measured == set(spread_positions(64, 5))


def test_what_is_not_shown_to_be_cheaper_is_not_offered() -> None:
    few = Estimate(value=0.5, low=None, high=None, confidence=0.95, rounds=3)
    assert keep_steps({0: few, 1: at(0.995), 2: at(0.5, 0.6)}) == []
    assert find_gaps({0: at(0.5, 0.2), 9: at(0.8, 0.2)}) == []  # the intervals touch


def test_a_dip_is_a_step_of_its_own() -> None:
    assert keep_steps({0: at(0.3), 1: at(0.5), 2: at(0.4), 3: at(0.7)}) == [0, 2, 3]


@pytest.mark.parametrize(
    ("length", "places"), [(0, []), (3, [0, 1, 2]), (9, [0, 2, 4, 6, 8]), (64, [0, 16, 32, 47, 63])]
)
def test_a_grid_holds_both_ends(length: int, places: list[int]) -> None:
    assert spread_positions(length, 5) == places


def test_a_journal_forgets_only_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "costs.jsonl"
    journal = Journal(path)
    for number in (4, 7):
        timing = Timing(sweep=number, site="s", subject="dense", trial=make_trial(5, number))
        journal.append(Sweep(number=number, timings=(timing, timing)))
    path.write_bytes(path.read_bytes() + encode(timing).encode()[:50])
    again = Journal(path)
    assert (again.done, len(again.timings)) == ({4, 7}, 4)
    again.append(Sweep(number=8, timings=()))
    assert Journal(path).done == {4, 7, 8}


NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 16))

def load():
    x = torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"calibration": {"a": x[:16]}, "test_inputs": x[16:], "test_labels": torch.arange(8) % 3}
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Journals and a store: the second table finds the first one's times and probes, as a user's would."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def prepared(results: Path) -> Prepared:
    bits = '[precision]\nweights = ["int8"]\nactivations = "dynamic"\n'
    write_priced_recipe(results, NET, f"kept_parameters = 0.9\n{bits}", step=8)
    return prepare(read_recipe(results / "net.toml"), results)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Give this machine, on which little is measured: as few ranks and sweeps as have an interval."""
    for name, value in {"SWEEPS": 6, "GRID": 2}.items():
        monkeypatch.setattr(costs, name, value)
    for measure in (costs.time_layers, costs.measure_costs):
        assert measure.__kwdefaults__
        monkeypatch.setitem(measure.__kwdefaults__, "passes", 1)
    return make_local(tmp_path / "work")


@pytest.mark.slow
def test_a_table_is_measured_here_and_an_interrupted_one_goes_on(
    prepared: Prepared, here: Device, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, steps, timed = Store(results / "store"), Steps(quiet=True), []
    real = Place.time

    def time(place: Place, subjects: list[object], number: int, _effort: object) -> list[Trial]:
        timed.append(number)
        if len(timed) == 8:
            raise KeyboardInterrupt
        return real(place, subjects, number, (5, 1, 1))  # type: ignore[arg-type]

    monkeypatch.setattr(Place, "time", time)
    with open_session(here) as session:
        place = choose_place(session, "onnx", 1)
        with pytest.raises(KeyboardInterrupt):
            measure_costs(prepared, store, place, results, steps)
        table = measure_costs(prepared, store, place, results, steps)
        assert len(set(timed)) == len(timed) - 1  # the one that was interrupted
        again = measure_costs(prepared, store, place, results, steps)
        check_table(table, prepared)
        assert again == table
        assert len(set(timed)) == len(timed) - 1
        refuse_foreign(table, place, "table")
        for change in ({"device": "pi4"}, {"runtime": "onnxruntime 0"}, {"agent_sha256": "0"}, {"format": "tflite"}):
            with pytest.raises(UnlikeConditions, match=f"{next(iter(change)).removesuffix('_sha256')} .*, now"):
                refuse_foreign(replace(table, **change), place, "table")  # type: ignore[arg-type]


def check_table(table: CostTable, prepared: Prepared) -> None:
    assert (table.device, table.format, table.threads, table.unit) == ("here", "onnx", 1, "ns")
    assert (table.model_sha256, table.activations) == (prepared.hash_model(), "dynamic")
    assert list(table.layers) == [layer.name for layer in find_layers(prepared.model)]
    for dense, *options in table.layers.values():
        assert dense.stored == Stored()
        assert options[0].stored == Stored(weights="int8"), "the one type of the recipe is on offer at any cost"
        assert all(one.high is not None and one.weights == "int8" for one in options)
    assert table.dense == table.fixed + sum(options[0].cost for options in table.layers.values())


MS = 10**6
PLAN = plan_energy(EnergyChoice(rounds=5, busy_ms=1000, idle_ms=1000), MeterChoice(name="hwmon"))


def make_metered(trial: Trial, nj: float) -> MeteredTrial:
    """Rest, a second of work in which an inference takes so much energy, rest; the meter loses nothing."""
    idle = (Span(start_ns=0, end_ns=1000 * MS), Span(start_ns=2000 * MS, end_ns=3000 * MS))
    loop = Span(start_ns=1000 * MS, end_ns=2000 * MS)
    at = tuple(range(0, 3010 * MS, 10 * MS))
    power = round(nj * len(trial.samples_ns) / 1000)
    rail = Rail(
        name="supply",
        at_ns=at,
        power_uw=(power,) * len(at),
        energy_uj=None,
        resolution_uw=1,
        resolution_uj=None,
        lag_ns=0,
        gaps=(),
        skipped=0,
    )
    trace = PowerTrace(meter="hwmon", provenance="measured", clock="monotonic", period_ns=10 * MS, rails=(rail,))
    return MeteredTrial(trial=replace(trial, loop=loop, idle=idle), trace=trace, trace_sha256="t")


def test_energies_of_layers_come_back_and_what_does_not_count_is_told() -> None:
    watched = [
        Watched(
            round=one.sweep,
            site=one.site,
            subject=one.subject,
            metered=make_metered(one.trial, 3 * one.trial.samples_ns[0]),
        )
        for one in make_world({8: 0.4}, sweeps=5)
    ]
    read = collect_energies(read_all(watched, PLAN), "s")
    assert read.share().value == pytest.approx(0.1, rel=1e-3)
    ratio = read.ratio(Stored(factors=Factors(rank=8)))
    assert ratio is not None
    assert ratio.value == pytest.approx(0.4, rel=1e-3)
    spoilt = [
        replace(one, metered=replace(one.metered, trial=replace(one.metered.trial, loop=None))) for one in watched
    ]
    with pytest.raises(MeasurementError, match="first of 35: model, round 0: onnxruntime does not report"):
        collect_energies(read_all(spoilt, PLAN), "s").share()
    with pytest.raises(MeasurementError, match="no round counts"):
        find_model_uj(read_all(spoilt, PLAN))


@pytest.mark.slow
def test_what_the_times_offer_is_metered_and_an_interrupted_table_goes_on(
    prepared: Prepared, here: Device, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trial is really watched, by the agent's own meter on a pretended sensor; the rest takes 4 W by its times."""
    write_power_meter(tmp_path / "root", 4_000_000)
    python = write_rooted_python(tmp_path)
    store, steps, taken, really = Store(results / "store"), Steps(quiet=True), [], energy_costs._take
    real = Place.time
    monkeypatch.setattr(Place, "time", lambda place, some, number, _: real(place, some, number, (5, 1, 1)))

    def take(subject: Subject, number: int, place: Place, choice: EnergyChoice) -> MeteredTrial:
        taken.append((number, subject.site, subject.name))
        if len(taken) == 1:
            return really(subject, number, place, choice)
        if len(taken) == 6:
            raise KeyboardInterrupt
        (trial,) = place.time([subject], number, (5, 1, 1))
        return make_metered(trial, 4 * median(trial.samples_ns))

    monkeypatch.setattr(energy_costs, "_take", take)
    with open_session(here) as session, pytest.raises(InputError, match="here has no meter"):
        measure_energies(prepared, store, choose_place(session, "onnx", 1), results, steps, PLAN.choice)
    metered = replace(here, python=str(python), meter=MeterChoice(name="hwmon"))
    with open_session(metered) as session:
        place = choose_place(session, "onnx", 1)
        with pytest.raises(KeyboardInterrupt):
            measure_energies(prepared, store, place, results, steps, PLAN.choice)
        table = measure_energies(prepared, store, place, results, steps, PLAN.choice)
        times = measure_costs(prepared, store, place, results, steps)
        assert measure_energies(prepared, store, place, results, steps, PLAN.choice) == table
    assert len(set(taken)) == len(taken) - 1
    assert (table.unit, table.rounds, list(table.layers)) == ("uj", 5, list(times.layers))
    for name, options in table.layers.items():
        assert {one.stored for one in options} <= {one.stored for one in times.layers[name]}
    assert table.dense == table.fixed + sum(options[0].cost for options in table.layers.values())
    first = Lines(Watched, next(results.glob("energies-*.jsonl"))).lines[0]
    assert first.metered.trace.rails[0].power_uw is not None
    assert set(first.metered.trace.rails[0].power_uw) == {4_000_000}
    drawn = io.StringIO()
    Console(file=drawn, width=200).print(tabulate(table))
    assert f"{table.dense:,} µJ" in drawn.getvalue()
