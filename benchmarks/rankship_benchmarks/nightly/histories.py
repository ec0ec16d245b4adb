"""Each case's history over the nights, for charts and step detection: read from the index, with reasons for gaps."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sqlalchemy import Engine, select

from rankship_benchmarks.index.tables import REASONS, RUNS, TRIALS
from rankship_benchmarks.nightly.records import DeviceNight, NightRecord
from rankship_benchmarks.stats.steps import Night
from rankship_pipeline.foundation.artifact_key import VARIANTS, ArtifactKey
from rankship_pipeline.foundation.frozen import record

_CANARY = "canary"
_KEY = tuple(one.name for one in fields(ArtifactKey))
_FEWEST_TRUSTED = 0.5  # share of the suite's rounds


@record
class Case:
    """One artifact of one recipe on one device, night after night."""

    device: str
    recipe: str
    key: ArtifactKey


@dataclass
class _Run:
    """One run in the index: medians in ns of the rounds that verdicts may use, and the reasons against the others."""

    rounds: int
    medians: dict[ArtifactKey, list[float]] = field(default_factory=dict)
    reasons: dict[ArtifactKey, Counter[str]] = field(default_factory=dict)

    def list_keys(self) -> list[ArtifactKey]:
        """List the artifacts of the build, dense first, without the canary."""
        known = {key for key in (*self.medians, *self.reasons) if key.variant in VARIANTS}
        return sorted(known, key=lambda key: key.order)

    @property
    def canary_ns(self) -> tuple[float, ...]:
        """The canary's rounds; empty if the run had none."""
        return tuple(time for key, times in self.medians.items() if key.variant == _CANARY for time in times)

    def find_gap(self, key: ArtifactKey) -> str | None:
        """Return why a case does not count; None if verdicts may use at least half of the suite's rounds."""
        trusted = len(self.medians.get(key, []))
        if trusted and trusted >= _FEWEST_TRUSTED * self.rounds:
            return None
        common = [reason for reason, _ in self.reasons.get(key, Counter()).most_common(1)]
        return (
            f"{common[0]}: only {trusted} of {self.rounds} rounds count"
            if common
            else f"{trusted} rounds of {self.rounds}"
        )


def list_histories(engine: Engine, nights: Sequence[NightRecord]) -> dict[Case, tuple[Night, ...]]:
    """Return every case's nights in order, one entry for each night in which its device was planned or stood in."""
    runs = _read_runs(engine, {one.run for night in nights for one in night.devices if one.run})
    cases: dict[Case, None] = {}
    for night in nights:
        for one in night.devices:
            if one.run in runs and one.measured_on:
                for key in runs[one.run].list_keys():
                    cases[Case(device=one.measured_on, recipe=night.recipe, key=key)] = None
    return {case: tuple(_follow(case, nights, runs)) for case in cases}


def _follow(case: Case, nights: Sequence[NightRecord], runs: dict[str, _Run]) -> list[Night]:
    return [
        _read_night(case, night, one, runs)
        for night in nights
        for one in night.devices
        if night.recipe == case.recipe and case.device in {one.device, one.measured_on}
    ]


def _read_night(case: Case, night: NightRecord, one: DeviceNight, runs: dict[str, _Run]) -> Night:
    run = runs.get(one.run or "")
    if run is None or one.measured_on != case.device:
        why = one.gap or (f"{one.measured_on} stood in" if one.measured_on else "not measured")
        return Night(run_id=f"night {night.number}", started_utc=night.started_utc, rounds_ns=(), gap=why)
    gap = one.gap or run.find_gap(case.key)
    rounds = () if gap else tuple(run.medians[case.key])
    return Night(
        run_id=one.run or "", started_utc=night.started_utc, rounds_ns=rounds, canary_ns=run.canary_ns, gap=gap
    )


def _read_runs(engine: Engine, folders: set[str]) -> dict[str, _Run]:
    runs: dict[str, _Run] = {}
    with engine.connect() as connection:
        numbers: dict[int, str] = {}
        chosen = select(RUNS.c.id, RUNS.c.folder, RUNS.c.rounds).where(RUNS.c.damage.is_(None))
        for number, folder, rounds in connection.execute(chosen):
            if folder in folders:
                numbers[number] = folder
                runs[folder] = _Run(rounds=rounds)
        medians = select(TRIALS.c.run, TRIALS.c.median_ns, *(TRIALS.c[name] for name in _KEY))
        counted = TRIALS.c.trusted.is_(True) & TRIALS.c.median_ns.is_not(None)
        for number, median_ns, *key in connection.execute(medians.where(counted).order_by(TRIALS.c.round)):
            if number in numbers:
                runs[numbers[number]].medians.setdefault(_read_key(key), []).append(median_ns)
        for number, reason, *key in connection.execute(
            select(REASONS.c.run, REASONS.c.reason, *(REASONS.c[name] for name in _KEY))
        ):
            if number in numbers:
                runs[numbers[number]].reasons.setdefault(_read_key(key), Counter())[reason] += 1
    return runs


def _read_key(values: Sequence[Any]) -> ArtifactKey:
    """Make a key from the index's columns."""
    return ArtifactKey(**dict(zip(_KEY, values, strict=True)))
