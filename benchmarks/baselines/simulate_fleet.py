# ruff: noqa: INP001, S311 - a script, no package; its dice need no secrecy
"""A fleet of 200 simulated devices, 10,000 jobs, 1,000 faults: checks for jobs lost, done twice or stored wrong.

    python benchmarks/baselines/simulate_fleet.py --out benchmarks/baselines/simulated_fleet.json

First in virtual time, with the schedule that a fleet uses, for the utilisation: 25 devices of each of eight kinds,
four fifths of the jobs for any device of a kind, one fifth for one device. Then with real threads and real result
files, every fault at a random moment of writing, and every stored number compared with what was to be stored.
"""

import argparse
import faulthandler
import heapq
import itertools
import json
import platform
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rankship_benchmarks.bundle.bundle import (
    BUNDLE_FILE,
    Header,
    append_trial,
    create_bundle,
    finish_bundle,
    open_bundle,
    writing,
)
from rankship_benchmarks.fleet.schedule import Job, Schedule
from rankship_benchmarks.fleet.threads import run_fleet
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import AgentDied, ConnectionLost, Rebooted, TargetTimeout
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.records import Build, RankPlan
from rankship_targets.trials.trial import DeviceState, RuntimeReading, Trial

KINDS, TWINS, JOBS, FAULTS, TRIALS = 8, 25, 10_000, 1_000, 12
HOST_KILLS, DEVICES_GONE = 10, 5
TAIL = 0.01  # share of the jobs: at the end devices idle because nothing is left for them
ROUNDS = 2  # of the runs that are really stored
MEAN_JOB_S, SPREAD = 600.0, 0.4
# Kinds of fault of a device, how many of a hundred, and after how many seconds it is back.
MISHAPS = {"cable out": (60, (120, 1200)), "rebooted": (20, (60, 300)), "agent killed": (20, (0, 1))}


@dataclass
class Lab:
    """A lab in virtual time: the events to come, the devices that are down, and the counts so far."""

    dice: random.Random
    devices: list[str]
    jobs: list[Job]
    faults: dict[int, str]
    length_s: dict[str, float]
    schedule: Schedule = field(init=False)
    failed: dict[str, str] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)  # (job, device) → trials that are on disk
    due: list[tuple[float, int, str, str]] = field(default_factory=list)
    begun: dict[str, float] = field(default_factory=dict)
    down: dict[str, float] = field(default_factory=dict)  # since when
    gone: dict[str, float] = field(default_factory=dict)
    down_s: float = 0.0
    busy_s: float = 0.0
    repeated_trials: int = 0
    interruptions: int = 0
    starts: int = 0
    utilisation_before_tail: float | None = None
    order: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.schedule = Schedule(self.jobs, self.devices)

    def plan(self, when: float, what: str, device: str) -> None:
        """Schedule an event."""
        heapq.heappush(self.due, (when, next(self.order), what, device))

    def hand_out(self, now: float) -> None:
        """Let every device that can begin a job begin one; a device that is down is lost then."""
        for device in self.devices:
            job = self.schedule.take(device)
            if job is None:
                continue
            if device in self.down or device in self.gone:
                self.schedule.lose(device, "unreachable")
                if device in self.gone:
                    self.schedule.give_up(device, "gone")
                continue
            self.starts += 1
            self.begun[device] = now
            left_s = (TRIALS - self.kept[job.name, device]) * self.length_s[job.name] / TRIALS
            fault = self.faults.get(self.starts)
            self.plan(now + (left_s if fault is None else self.dice.random() * left_s), fault or "done", device)

    def stop_work(self, now: float, device: str) -> None:
        """Count the work on an interrupted job: its whole trials are on disk, one trial is repeated."""
        job = self.schedule.running[device]
        worked_s = now - self.begun.pop(device)
        self.busy_s += worked_s
        trials = worked_s * TRIALS / self.length_s[job.name]
        self.kept[job.name, device] += int(trials)
        self.repeated_trials += trials > int(trials)
        self.interruptions += 1

    def meet(self, now: float, what: str, device: str) -> None:
        """Process one event."""
        if what == "done":
            self.done[self.schedule.running[device].name] += 1
            if len(self.done) == round((1 - TAIL) * len(self.jobs)):
                self.utilisation_before_tail = self.find_utilisation(now)
            self.busy_s += now - self.begun.pop(device)
            self.schedule.finish(device)
        elif what == "back":
            self.down_s += now - self.down.pop(device)
            self.schedule.restore(device)
        elif what == "host killed":
            self.kill_host(now)
        elif what == "gone":
            self.stop_work(now, device)
            self.schedule.lose(device, what)
            self.schedule.give_up(device, what)
            self.gone[device] = now
        else:
            self.stop_work(now, device)
            self.schedule.lose(device, what)
            self.down[device] = now
            self.plan(now + self.dice.uniform(*MISHAPS[what][1]), "back", device)

    def kill_host(self, now: float) -> None:
        """Drop everything but what is on disk: which jobs ended, and the trials of those that had not."""
        for device in list(self.schedule.running):
            self.stop_work(now, device)
        self.keep_failures()
        left = [job for job in self.jobs if job.name not in self.done and job.name not in self.failed]
        self.schedule = Schedule(left, self.devices)
        self.due = [event for event in self.due if event[2] == "back"]
        heapq.heapify(self.due)

    def keep_failures(self) -> None:
        """Record the jobs that ended without a result, and why."""
        self.failed |= {name: one.failure for name, one in self.schedule.outcomes.items() if one.failure}

    def find_utilisation(self, now: float) -> float:
        """Return the time that devices worked over the time that they were up, until now."""
        down_s = self.down_s + sum(now - since for since in (*self.down.values(), *self.gone.values()))
        busy_s = self.busy_s + sum(now - since for since in self.begun.values())
        return busy_s / (now * len(self.devices) - down_s)

    def run(self) -> float:
        """Process all events; returns the time when the last job ended."""
        now = 0.0
        self.hand_out(now)
        while not self.schedule.finished:
            now, _, what, device = heapq.heappop(self.due)
            self.meet(now, what, device)
            self.hand_out(now)
        self.keep_failures()
        return now


def simulate_time(seed: int) -> dict[str, object]:
    """Run the lab once in virtual time; returns its counts."""
    dice = random.Random(seed)
    devices = [f"kind{kind}-{twin}" for kind in range(KINDS) for twin in range(TWINS)]
    kinds = [tuple(devices[TWINS * kind :][:TWINS]) for kind in range(KINDS)]
    jobs = [
        Job(
            name=f"job{number}", devices=kinds[number % KINDS] if number % 5 else (devices[number // 5 % len(devices)],)
        )
        for number in range(JOBS)
    ]
    names = [name for name, (weight, _) in MISHAPS.items() for _ in range(weight)]
    starts = dice.sample(range(1, JOBS), FAULTS)
    fates = ["host killed"] * HOST_KILLS + ["gone"] * DEVICES_GONE
    fates += [dice.choice(names) for _ in range(FAULTS - len(fates))]
    length_s = {job.name: MEAN_JOB_S * dice.lognormvariate(0, SPREAD) for job in jobs}
    lab = Lab(dice=dice, devices=devices, jobs=jobs, faults=dict(zip(starts, fates, strict=True)), length_s=length_s)
    end = lab.run()
    return {
        "seed": seed,
        "jobs": len(jobs),
        "done": len(lab.done),
        "done_twice": sum(count > 1 for count in lab.done.values()),
        "failed_with_a_reason": len(lab.failed),
        "lost": len(jobs) - len(set(lab.done) | set(lab.failed)),
        "faults": len(lab.faults),
        "interrupted_attempts": lab.interruptions,
        "repeated_trials": lab.repeated_trials,
        "virtual_hours": round(end / 3600, 2),
        "utilisation_until_99_percent_done": round(lab.utilisation_before_tail or 0, 4),
        "utilisation_to_the_last_job": round(lab.find_utilisation(end), 4),
    }


def make_trial(job: str, device: str, number: int) -> Trial:
    """Make the trial that a job must store: its samples are a function of the job and the round."""
    untold = DeviceState(
        governor=None, frequency_khz=None, temperature_mc=None, load_1m_milli=None, available_memory_bytes=None
    )
    return Trial(
        round=number,
        key=ArtifactKey(variant="dense", format="onnx"),
        artifact_sha256="a",
        device=device,
        started_utc="2026-01-01T00:00:00+00:00",
        threads=1,
        load_ns=1,
        warmup_ns=(1,),
        warmed_up=True,
        samples_ns=tuple(int(digest([job, number, place])[:8], 16) for place in range(3)),
        peak_rss_bytes=None,
        runtime_rss_bytes=None,
        runtime=RuntimeReading(name="none", version="0", python="3", machine="m", kernel="k"),
        before=untold,
        after=untold,
        agent_sha256="g",
        retries=0,
    )


def make_header(job: str, device: str) -> Header:
    """Make the header of an empty run."""
    plan = RankPlan(
        method="none",
        layers=(),
        fixed_parameters=1,
        total_parameters=1,
        unit="parameters",
        total_cost=1,
        budget_cost=1,
        predicted_error=0.0,
    )
    build = Build(
        recipe=job, recipe_sha256="r", artifacts=(), plan=plan, accuracies=(), alternatives=(), dense_parameters=1
    )
    return Header(
        run_id=f"{job}-{device}",
        created_utc="2026-01-01T00:00:00+00:00",
        suite_sha256="s",
        recipe=job,
        recipe_sha256="r",
        build_sha256="b",
        device=device,
        build=build,
        verified=(),
        rounds=ROUNDS,
        conditions={},
        rankship_version="0",
    )


def store_for_real(seed: int, results: Path) -> dict[str, object]:
    """Let 200 threads write 10,000 runs with 1,000 faults in mid-write, and check every stored number."""
    dice = random.Random(seed)
    devices = [f"d{number}" for number in range(KINDS * TWINS)]
    jobs = [Job(name=f"job{number}", devices=(devices[number % len(devices)],)) for number in range(JOBS)]
    faulty = {job.name: dice.choice(("before", "between", "torn", "after")) for job in dice.sample(jobs, FAULTS)}
    tried: Counter[str] = Counter()
    appended: Counter[str] = Counter()
    turn = threading.Lock()

    def work(device: str, job: Job) -> Path:
        with turn:
            tried[job.name] += 1
            fault = faulty.get(job.name) if tried[job.name] == 1 else None
        folder = results / f"{job.name}-{device}"
        if fault == "before":
            raise ConnectionLost("cable out", hint="")
        if not folder.exists():
            create_bundle(folder, make_header(job.name, device))
        with writing(folder):
            for number in range(len(open_bundle(folder).trials), ROUNDS):
                append_trial(folder, make_trial(job.name, device, number))
                with turn:
                    appended[job.name] += 1
                if fault == "torn":
                    with (folder / BUNDLE_FILE).open("ab") as stream:
                        stream.write(b'{"kind":"trial","agent_sha')
                if fault in {"torn", "between"}:
                    raise (Rebooted if fault == "torn" else TargetTimeout)(fault, hint="")
            if fault == "after":
                raise AgentDied("after the last trial", hint="")
            finish_bundle(folder)
        return folder

    begun = time.perf_counter()
    ended = run_fleet(jobs, work, pauses_s=(0.0,) * FAULTS)
    wall_s = time.perf_counter() - begun
    wrong = 0
    for job in jobs:
        result = ended[job.name].result
        bundle = open_bundle(result) if result else None
        wanted = tuple(make_trial(job.name, job.devices[0], number) for number in range(ROUNDS))
        wrong += bundle is None or not bundle.finished or bundle.trials != wanted
    return {
        "seed": seed,
        "threads": len(devices),
        "jobs": len(jobs),
        "faults": len(faulty),
        "wrong_or_missing_numbers": wrong,
        "trials_written_twice": sum(count > ROUNDS for count in appended.values()),
        "attempts": sum(tried.values()),
        "wall_seconds": round(wall_s, 1),
    }


def main() -> None:
    """Run both parts and write the results."""
    parser = argparse.ArgumentParser(description="Simulate a fleet of 200 devices.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="runs in virtual time (default: %(default)s)")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(1800, exit=True)  # shows where, if it hangs
    in_time = [simulate_time(seed) for seed in range(arguments.seeds)]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:  # noqa: S108
        stored = store_for_real(0, Path(folder))
    conditions = {"python": platform.python_version(), "machine": platform.machine(), "mean_job_s": MEAN_JOB_S}
    report = {"simulated": True, "conditions": conditions, "virtual_time": in_time, "real_files": stored}
    write_atomic(arguments.out, json.dumps(report, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
