"""Power whose energy is known: traces of it, trials that a meter watched, and a whole run of such."""

from dataclasses import replace

import numpy as np

from make.judged_runs import make_run
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.bundle.suite import EnergyChoice, EnergyPlan
from rankship_pipeline.foundation.codec import digest
from rankship_targets.trials.trace import PowerTrace, Rail
from rankship_targets.trials.trial import MeteredTrial, Span, Trial

TRIAL: Trial = make_run(rounds=1, layers=3).trials[0]

S, MS = 1_000_000_000, 1_000_000
IDLE_UW, BUSY_UW, INFERENCES = 2_300_000, 5_100_000, len(TRIAL.samples_ns)
LOOP = Span(start_ns=14 * S, end_ns=25 * S)
RESTS = (Span(start_ns=1 * S, end_ns=12 * S), Span(start_ns=27 * S, end_ns=38 * S))
WATCHED = replace(TRIAL, loop=LOOP, idle=RESTS)
TOTAL_NJ = BUSY_UW * 11 * S / 1e6 / INFERENCES
MARGINAL_NJ = (BUSY_UW - IDLE_UW) * 11 * S / 1e6 / INFERENCES
PLAN = EnergyPlan(choice=EnergyChoice(), meter="replay", period_us=10_000, rails=(), calibration_ppm=None)
SECONDS = np.arange(0, 40 * S, 10 * MS) / S

ROUNDS, BASE = 6, make_run(rounds=2, layers=3)
ENERGY_PLAN = replace(PLAN, choice=EnergyChoice(rounds=ROUNDS))
POWERS_UW = {"dense": 5_100_000, "compressed": 3_700_000}
TRUE_NJ = {variant: power * 11 * 1000 / INFERENCES for variant, power in POWERS_UW.items()}
TRUE_MARGINAL_NJ = {variant: (power - IDLE_UW) * 11 * 1000 / INFERENCES for variant, power in POWERS_UW.items()}


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


def watch_trial(trial: Trial, number: int, power_uw: float, **changes: object) -> MeteredTrial:
    """One round, whose samples stay at one speed so that nothing doubts them."""
    samples = tuple(trial.samples_ns[0] + place % 2 for place in range(len(trial.samples_ns)))
    trial = replace(trial, round=number, samples_ns=samples, loop=LOOP, idle=RESTS)
    return watch(make_rail(power_at(SECONDS, busy_uw=power_uw)), trial=trial, **changes)


def make_metered(spread: float = 0.002, factor: float = 1.0, seed: int = 3, **changes: object) -> Bundle:
    """A run whose onnx artifacts were watched for ROUNDS rounds."""
    random = np.random.default_rng(seed)
    first = [trial for trial in BASE.trials if trial.round == 0 and trial.key.format == "onnx"]
    metered = [
        watch_trial(trial, number, factor * POWERS_UW[trial.key.variant] * random.normal(1, spread), **changes)
        for number in range(ROUNDS)
        for trial in first
    ]
    return replace(BASE, header=replace(BASE.header, energy=ENERGY_PLAN), metered=tuple(metered))
