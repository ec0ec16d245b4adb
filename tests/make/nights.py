"""Nights of measuring: their runs, their plan, and their records."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from make.artifacts import DENSE
from make.bundles import change_trials, keep
from make.judged_runs import make_run
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.fleet.measure import Measure
from rankship_benchmarks.fleet.schedule import read_jobs
from rankship_benchmarks.nightly.night import Tonight, run_night
from rankship_benchmarks.nightly.records import CaseVerdict, DeviceNight, NightRecord
from rankship_pipeline.foundation.console import Steps

FULL: Bundle = make_run(rounds=9, layers=3, samples=11)
SMALL = replace(FULL, trials=tuple(one for one in FULL.trials if one.key == DENSE), finished=True)
BUILD = SMALL.header.build_sha256
QUIET = Steps(quiet=True)
Spoil = Callable[[Bundle], Bundle]


def make_night_bundle(device: str, number: int, *, slower: float = 1.0, spoil: Spoil = lambda one: one) -> Bundle:
    """One night of one device: the same model, other noise."""
    noise = np.random.default_rng([number, len(device)]).lognormal(0, 0.004, len(SMALL.trials))
    trials = tuple(
        replace(
            trial, device=device, samples_ns=tuple(int(slower * factor * 412_000 + 40 * place) for place in range(11))
        )
        for trial, factor in zip(SMALL.trials, noise, strict=True)
    )
    header = replace(SMALL.header, run_id=f"{device}-{number}", device=device)
    return spoil(replace(SMALL, header=header, trials=trials))


def keep_run(results: Path, bundle: Bundle) -> Path:
    """Write a run into the folder of its name, going on with what is there of it."""
    return keep(results / bundle.header.run_id, bundle)


def plan_night(results: Path, on: str = "a") -> Tonight:
    jobs = read_jobs(on)
    results.mkdir(exist_ok=True)
    return Tonight(results=results, suite=("tiny", "s"), recipe="digits-merge", jobs=jobs, pauses_s=())


def measure_with(results: Path, **changes: Any) -> Measure:  # noqa: ANN401 - what make_bundle takes
    def measure(device: str, _: Steps) -> Path:
        return keep_run(results, make_night_bundle(device, 1 + len(list(results.glob(f"{device}-*"))), **changes))

    return measure


def do_night(tonight: Tonight, measure: Measure | None = None, build: str = BUILD) -> NightRecord:
    """Do a night whose build is known; `measure` keeps a run of its own where nothing else is given."""
    night = run_night(tonight, lambda: (build, measure or measure_with(tonight.results)), QUIET)
    assert night is not None
    return night


def throttle(bundle: Bundle) -> Bundle:
    """The same run on a device that was throttled all along."""
    return change_trials(bundle, after=replace(bundle.trials[0].after, throttled_bits=0b100))


def read_words(night: NightRecord) -> list[str]:
    return [case.verdict for one in night.devices for case in one.cases]


def make_device_night(device: str, error: str | None, cases: tuple[CaseVerdict, ...] = ()) -> DeviceNight:
    return DeviceNight(device=device, measured_on=device, run="r", gap=error, error=error, losses=(), cases=cases)


def make_night(number: int, devices: Sequence[DeviceNight]) -> NightRecord:
    return NightRecord(
        number=number,
        suite="tiny",
        suite_sha256="s",
        recipe="r",
        build_sha256="b",
        started_utc=f"2026-{1 + number // 28:02}-{1 + number % 28:02}T02:00:00+00:00",
        finished_utc=None,
        asked=tuple(one.device for one in devices),
        devices=tuple(devices),
        failure=None,
        exit_code=0,
    )
