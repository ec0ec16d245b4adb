"""Energy measured through a real session and agent on this machine, with a meter whose power is known."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from make.artifacts import describe_file, sign
from make.builds import make_build
from make.devices import make_local, write_power_meter, write_rooted_python
from make.onnx_files import make_products
from rankship_benchmarks.bundle.bundle import BUNDLE_FILE, Bundle, open_bundle
from rankship_benchmarks.bundle.suite import EnergyChoice, Suite
from rankship_benchmarks.judge.energy_figures import CaseEnergy
from rankship_benchmarks.judge.summary import summarise
from rankship_benchmarks.measure import cases
from rankship_benchmarks.measure import one_device as measure
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import ConnectionLost, InputError, Lacks
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.devices.device import Device
from rankship_targets.devices.meter_choice import MeterChoice
from rankship_targets.meters.file_meter import FileMeter, write_trace
from rankship_targets.trials.trace import PowerTrace, Rail
from rankship_targets.trials.trial import MeteredTrial

IDLE_UW, BUSY_UW, BOARD_UW = 2_000_000, 3_500_000, 4_200_000
MS, STEP_NS, MARGIN_NS = 10**6, 5 * 10**6, 20 * 10**9
SUITE = Suite(recipe="r", rounds=1, min_samples=20, min_duration_ms=1, canary=False)
SHORT = EnergyChoice(rounds=5, busy_ms=1000, idle_ms=1000)
CALM = EnergyChoice(rounds=7, busy_ms=2500, idle_ms=2500)  # two rounds to spare, and slow readings: hosts are busy


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cases, "find_inputs", lambda *_: [tmp_path / "x.npy"])
    (tmp_path / "store").mkdir()
    write_power_meter(tmp_path / "root", BOARD_UW)
    write_rooted_python(tmp_path)
    weight, ones = np.full((64, 64), 0.01, np.float32), np.ones((1, 64, 64), np.float32)
    onnx.save(make_products(weight, rows=64), tmp_path / "store/small.onnx")
    np.save(tmp_path / "x.npy", ones)
    return tmp_path


def make_device(folder: Path, choice: MeterChoice | None) -> Device:
    return replace(make_local(folder / "work", "bench-board", folder / "python"), meter=choice)


def measure_small(folder: Path, choice: MeterChoice | None, suite: Suite) -> Bundle:
    """The whole of a run: push, prove, time, and then watch."""
    model = folder / "store/small.onnx"
    build, proof = make_build(describe_file(model, parameters=4096), recipe="small"), sign(model)
    device, store = make_device(folder, choice), Store(folder / "store")
    results = folder / "results"
    plan = RunPlan(build, [proof], store, suite, results, ParityChoice())
    run = measure.measure_build(plan, device, Steps(quiet=True))
    return open_bundle(run)


@pytest.fixture(autouse=True)
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity on a device is tried elsewhere."""
    monkeypatch.setattr(measure, "verify_on_device", lambda *_: ())


def write_step(path: Path, start_ns: int, end_ns: int) -> None:
    """What a meter on the device's clock would have left: BUSY_UW between two instants, IDLE_UW around them."""
    edges = range(start_ns - MARGIN_NS, end_ns + MARGIN_NS, STEP_NS)
    at = sorted({*edges, start_ns - 1, start_ns, end_ns, end_ns + 1})
    rail = Rail(
        name="supply",
        at_ns=tuple(at),
        power_uw=tuple(BUSY_UW if start_ns <= one <= end_ns else IDLE_UW for one in at),
        energy_uj=None,
        resolution_uw=1000,
        resolution_uj=None,
        lag_ns=0,
        gaps=(),
        skipped=0,
    )
    trace = PowerTrace(meter="supply", provenance="measured", clock="monotonic", period_ns=STEP_NS, rails=(rail,))
    write_trace(trace, path)


@contextmanager
def record_steps(folder: Path) -> Iterator[Path]:
    """Play a meter: see on the device when the agent's loop ran, and leave a trace of that before the rest ends."""
    over, path = threading.Event(), folder / "recording.json"

    def play() -> None:
        seen: set[str] = set()
        while not over.wait(0.05):
            for events in folder.glob("work/runs/*/events.jsonl"):
                with suppress(OSError, ValueError):
                    lines = [json.loads(line) for line in events.read_text().splitlines()]
                    loops = [one for one in lines if one["event"] == "samples"]
                    if loops and events.parent.name not in seen:
                        seen.add(events.parent.name)
                        write_step(path, loops[0]["start_ns"], loops[0]["end_ns"])

    player = threading.Thread(target=play)
    player.start()
    try:
        yield path
    finally:
        over.set()
        player.join()


def find_energy(bundle: Bundle) -> CaseEnergy:
    (result,) = summarise(bundle).results
    assert result.energy is not None
    return result.energy


def spend_nj(bundle: Bundle, power_uw: int) -> float:
    """What that power spends on an inference, by the loops that the agent told: the mean over rounds."""
    loops = [(one.trial.loop, len(one.trial.samples_ns)) for one in bundle.metered]
    return float(np.mean([power_uw * loop.length_ns / 1e6 / count for loop, count in loops if loop]))


@pytest.mark.slow
def test_a_known_step_of_power_comes_out_as_joules_within_1_percent(folder: Path) -> None:
    with record_steps(folder) as path:
        bundle = measure_small(folder, MeterChoice(name="replay", file=str(path)), replace(SUITE, energy=SHORT))
    assert bundle.finished
    assert [one.trial.round for one in bundle.metered] == list(range(5))
    for one in bundle.metered:
        before, after = one.trial.idle
        assert one.trial.loop is not None
        assert before.end_ns < one.trial.loop.start_ns < one.trial.loop.end_ns < after.start_ns
        assert one.trial.loop.length_ns >= sum(one.trial.samples_ns)
        assert min(span.length_ns for span in (*one.trial.idle, one.trial.loop)) >= 1000 * MS
    energy = find_energy(bundle)
    assert energy.refused == ()
    for found, power_uw in ((energy.total, BUSY_UW), (energy.marginal, BUSY_UW - IDLE_UW)):
        assert found is not None
        assert found.value_nj == pytest.approx(spend_nj(bundle, power_uw), rel=0.01)
    assert energy.idle_uw == pytest.approx(IDLE_UW, rel=0.001)
    assert (energy.meter, energy.provenance) == ("replay of supply", "measured")
    assert all(trial.idle == () for trial in bundle.trials)  # those of latency rest nowhere, and no meter ran


@pytest.mark.slow
def test_the_agents_own_meter_watches_beside_it_and_a_constant_power_gives_no_marginal(folder: Path) -> None:
    bundle = measure_small(folder, MeterChoice(name="hwmon", period_us=40_000), replace(SUITE, energy=CALM))
    energy = find_energy(bundle)
    assert energy.total is not None
    assert energy.total.value_nj == pytest.approx(spend_nj(bundle, BOARD_UW), rel=0.01)
    assert energy.marginal is None
    assert "overlap" in energy.refused[-1]
    assert (energy.meter, energy.provenance, energy.rails) == ("hwmon", "measured", ("ina226@hwmon0:power1",))


def test_a_meter_that_is_not_there_is_told_before_anything_is_measured(folder: Path) -> None:
    asking = replace(SUITE, energy=SHORT)
    with pytest.raises(InputError, match="bench-board has no meter"):
        measure_small(folder, None, asking)
    with pytest.raises(Lacks, match="meter rapl: no powercap zone"):
        measure_small(folder, MeterChoice(name="rapl"), asking)
    with pytest.raises(InputError, match="has no rail 'gpu'"):
        measure_small(folder, MeterChoice(name="hwmon", rails=("gpu",)), asking)
    assert not (folder / "results").exists()


@pytest.mark.slow
def test_a_run_goes_on_at_the_first_round_that_was_not_watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, count = FileMeter.stop, iter(range(100))

    def break_off(meter: FileMeter) -> PowerTrace:
        number = next(count)
        if number == 1:
            raise ConnectionLost("the way to the meter broke", hint="")  # taken anew
        if number == 3:
            raise KeyboardInterrupt
        return stop(meter)

    monkeypatch.setattr(FileMeter, "stop", break_off)
    with record_steps(folder) as path:
        choice, suite = MeterChoice(name="replay", file=str(path)), replace(SUITE, energy=SHORT)
        with pytest.raises(KeyboardInterrupt):
            measure_small(folder, choice, suite)
        (begun,) = (folder / "results").glob("[!.]*")
        kept: tuple[MeteredTrial, ...] = open_bundle(begun).metered
        assert [one.trial.round for one in kept] == [0, 1]
        bundle = measure_small(folder, choice, suite)
    assert [one.trial.round for one in bundle.metered] == list(range(5))
    assert bundle.metered[:2] == kept
    assert (begun / BUNDLE_FILE).exists()
    assert len(list((folder / "results").glob("[!.]*"))) == 1
    assert os.listdir(folder / "work/runs") == []  # noqa: PTH208 - names
