# ruff: noqa: INP001 - a script, no package
"""A simulated week of nightlies, made of rounds measured on a real machine, with an injected 3 % regression.

    python benchmarks/baselines/simulated_week.py RECORDED --to FOLDER --out benchmarks/baselines/simulated_week.json

RECORDED is a results folder of one recipe on one device. Every simulated night draws whole rounds (a trial of each
artifact, measured together) from all recorded ones, with replacement; so nights differ only as rounds do. The recorded
load is left out: the machine is shared, and verdicts would use none of its rounds. Two quiet weeks come first, then the
week: on its third night every trial reports throttling (and took 1.4 times as long), from its fifth night on the
compressed model takes 1.03 times as long. All of it goes through the nightly itself: its records, its index, its
verdicts, and its page, which says at the top that it is simulated.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from rankship_benchmarks.bundle.bundle import Bundle, append_trial, create_bundle, finish_bundle, open_bundle, writing
from rankship_benchmarks.fleet.schedule import read_jobs
from rankship_benchmarks.index.index import refresh_own_index
from rankship_benchmarks.judge.validity import keep_valid
from rankship_benchmarks.nightly import records as nights
from rankship_benchmarks.nightly.histories import list_histories
from rankship_benchmarks.nightly.night import Tonight, run_night
from rankship_benchmarks.nightly.page import write_page
from rankship_benchmarks.stats.estimates import relative_spread
from rankship_benchmarks.stats.steps import find_steps
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import write_atomic
from rankship_targets.trials.trial import Trial

QUIET_NIGHTS, WEEK = 14, 7
THROTTLED_NIGHT, REGRESSED_NIGHT = QUIET_NIGHTS + 3, QUIET_NIGHTS + 5
REGRESSION, THROTTLING = 1.03, 1.4
FIRST = datetime(2026, 11, 2, 2, 15, tzinfo=UTC)
NOTE = "simulated: recorded rounds, drawn anew for each night"


def pool_rounds(folders: list[Path]) -> list[tuple[Trial, ...]]:
    """Collect every recorded round of which all trials are valid."""
    pool = []
    for folder in folders:
        bundle = open_bundle(folder)
        cases = len({one.key for one in bundle.trials})
        rounds: dict[int, list[Trial]] = {}
        for trial in keep_valid(bundle.trials):
            rounds.setdefault(trial.round, []).append(trial)
        pool += [tuple(members) for members in rounds.values() if len(members) == cases]
    return pool


def draw_night(number: int, rounds: int, recorded: Bundle, pool: list[tuple[Trial, ...]], seed: int) -> Bundle:
    """Draw one night's run, with the night's injected change."""
    dice, began = random.Random(f"{seed} {number}"), FIRST + timedelta(days=number - 1)  # noqa: S311 - no secret
    trials = []
    for place in range(rounds):
        for trial in dice.choice(pool):
            slower = REGRESSION if number >= REGRESSED_NIGHT and trial.key.variant == "compressed" else 1.0
            before, after = (dataclasses.replace(one, load_1m_milli=None) for one in (trial.before, trial.after))
            if number == THROTTLED_NIGHT:
                slower, after = slower * THROTTLING, dataclasses.replace(after, throttled_bits=0b100)
            trials.append(
                dataclasses.replace(
                    trial,
                    round=place,
                    started_utc=(began + timedelta(seconds=5 * place)).isoformat(timespec="seconds"),
                    samples_ns=tuple(round(slower * sample) for sample in trial.samples_ns),
                    before=before,
                    after=after,
                )
            )
    header = dataclasses.replace(
        recorded.header,
        run_id=f"simulated-night-{number:02}",
        created_utc=began.isoformat(timespec="seconds"),
        rounds=rounds,
        conditions=recorded.header.conditions | {"simulated": NOTE},
    )
    return Bundle(header=header, trials=tuple(trials), finished=True)


def set_clock(number: int) -> Any:  # noqa: ANN401 - a context that puts a clock in the place of another
    """Set the nightly's clock to that night."""
    moment = FIRST + timedelta(days=number - 1)
    now: Callable[..., datetime] = lambda *_: moment  # noqa: E731
    return patch.object(nights, "datetime", type("Clock", (datetime,), {"now": staticmethod(now)}))


def keep(folder: Path, bundle: Bundle) -> Path:
    """Write a run's bundle as measuring does."""
    create_bundle(folder, bundle.header)
    with writing(folder):
        for trial in bundle.trials:
            append_trial(folder, trial)
        finish_bundle(folder)
    return folder


def main() -> None:
    """Simulate, print each night, and write the figures."""
    parser = argparse.ArgumentParser(description="Simulate a week of nightlies from recorded rounds.")
    parser.add_argument("recorded", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="an empty folder for the simulated results")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go (JSON)")
    parser.add_argument("--rounds", type=int, default=40, help="rounds a night (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True)
    folders = sorted(path.parent for path in arguments.recorded.glob("[!.]*/trials.jsonl"))
    pool, recorded = pool_rounds(folders), open_bundle(folders[0])
    name = recorded.header.device
    tonight = Tonight(
        results=arguments.to,
        suite=("simulated week", "simulated"),
        recipe=recorded.header.recipe,
        jobs=read_jobs(name),
    )
    told = []
    for number in range(1, QUIET_NIGHTS + WEEK + 1):
        bundle = draw_night(number, arguments.rounds, recorded, pool, arguments.seed)
        folder = arguments.to / bundle.header.run_id

        def prepare(bundle: Bundle = bundle, folder: Path = folder) -> tuple[str, Callable[..., Path]]:
            return bundle.header.build_sha256, lambda *_: keep(folder, bundle)

        with set_clock(number):
            night = run_night(tonight, prepare, Steps(quiet=True))
        if night is None:
            raise SystemExit("another nightly is at work there")
        told.append(describe(night))
        print(json.dumps(told[-1], ensure_ascii=False))  # noqa: T201 - a script
    every = nights.list_nights(arguments.to)
    histories = list_histories(refresh_own_index(arguments.to), every)
    write_page(arguments.to, every[-1], every, histories, note=NOTE)
    report = {
        "simulated": NOTE,
        "recorded": {
            "runs": len(folders),
            "rounds": len(pool),
            "conditions": recorded.header.conditions,
            "spread_between_rounds": spread_rounds(pool),
            "highest_load_1m_milli": max(one.before.load_1m_milli or 0 for members in pool for one in members),
        },
        "rounds_a_night": arguments.rounds,
        "seed": arguments.seed,
        "injected": {
            "ratio": REGRESSION,
            "case": "compressed",
            "from_night": REGRESSED_NIGHT,
            "throttled_night": THROTTLED_NIGHT,
        },
        "steps": {
            case.key.heading: [dataclasses.asdict(step) for step in find_steps(history)]
            for case, history in histories.items()
        },
        "nights": told,
    }
    write_atomic(arguments.out, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")


def describe(night: nights.NightRecord) -> dict[str, object]:
    """Describe the nightly's verdicts."""
    (one,) = night.devices
    return {
        "night": night.number,
        "exit": night.exit_code,
        "gap": one.gap,
        "cases": {
            case.key.heading: {
                "word": case.verdict,
                "step": case.step,
                "ratio": round(case.ratio.value, 4) if case.ratio else None,
                "interval": [case.ratio.low, case.ratio.high] if case.ratio else None,
            }
            for case in one.cases
        },
    }


def spread_rounds(pool: list[tuple[Trial, ...]]) -> dict[str, float]:
    """Return the interquartile range over the median of the recorded rounds, for each case."""
    medians: dict[str, list[float]] = {}
    for members in pool:
        for trial in members:
            medians.setdefault(trial.key.heading, []).append(median(trial.samples_ns))
    return {name: round(relative_spread(values), 4) for name, values in medians.items()}


if __name__ == "__main__":
    main()
