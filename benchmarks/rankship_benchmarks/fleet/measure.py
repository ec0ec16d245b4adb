"""Measures several devices at once, each with its own progress lines; a failure on one does not stop the others."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.fleet.schedule import Job, list_devices
from rankship_benchmarks.fleet.threads import PAUSES_S, Ended, run_fleet
from rankship_benchmarks.measure.cases import list_cases
from rankship_benchmarks.measure.host_gate import verify_on_host
from rankship_benchmarks.measure.one_device import measure_build
from rankship_benchmarks.measure.ready import check_ready
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_pipeline.export.canary import make_canary
from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.records import Build
from rankship_pipeline.foundation.store import Store
from rankship_targets.devices.device import Device

if TYPE_CHECKING:
    from rankship_pipeline.flow.prepared import Prepared

Measure = Callable[[str, Steps], Path]


class Lab(Protocol):
    """The devices that a command names, and who holds them: this machine, or the hosts of a rack."""

    def check(
        self, device: str, wanted: Mapping[Format, Collection[Delegate]], steps: Steps, *, with_energy: bool
    ) -> None:
        """Raise TargetError unless a device answers and can run what will be pushed."""

    def measure(self, plan: RunPlan, device: str, steps: Steps) -> Path:
        """Measure a build on one device; returns the folder of its bundle below the plan's results."""


@dataclass(frozen=True)
class Here:
    """Devices that this machine reaches by its own inventory."""

    devices: Mapping[str, Device]

    def check(
        self, device: str, wanted: Mapping[Format, Collection[Delegate]], steps: Steps, *, with_energy: bool
    ) -> None:
        """Open a session on a device and probe it."""
        check_ready([self.devices[device]], wanted, steps, with_energy=with_energy)

    def measure(self, plan: RunPlan, device: str, steps: Steps) -> Path:
        """Measure a build in a session of this process."""
        return measure_build(plan, self.devices[device], steps)


def measure_devices(
    jobs: Sequence[Job],
    measure: Measure,
    steps: Steps,
    *,
    ended: Callable[[str, str, Path], None] = lambda *_: None,
    pauses_s: Sequence[float] = PAUSES_S,
) -> Mapping[str, Ended[Path]]:
    """Do every job by `measure(device's name, its own steps)`; returns how each ended, with its run's folder.

    `ended(job's name, device's name, folder)` is called when each run is done, in the thread of its device.
    """
    devices = list_devices(jobs)
    alone = len(devices) == 1
    with nullcontext(lambda _: steps) if alone else steps.side_by_side() as start:
        own = {name: start(name) for name in devices}

        def work(name: str, job: Job) -> Path:
            folder = measure(name, own[name])
            ended(job.name, name, folder)
            return folder

        return run_fleet(jobs, work, pauses_s=pauses_s)


def plan_measuring(
    build: Build,
    prepared: "Prepared",
    suite: Suite,
    store: Store,
    results: Path,
    steps: Steps,
    *,
    profile: bool = False,
) -> RunPlan:
    """Verify a build, and the suite's canary; returns what is to be measured, and profiled, on each device."""
    exam = None
    if suite.accuracy is not None:
        from rankship_benchmarks.measure.exam import set_exam  # now: this imports torch

        exam = set_exam(prepared, suite.accuracy.samples)
    list_cases(build.artifacts, suite)  # refuses delegates that no file was made for
    canary = make_canary(build.artifacts[0].key.format, store, steps) if suite.canary else None
    timed = replace(build, artifacts=(*build.artifacts, canary)) if canary else build
    limits = prepared.recipe.parity
    verified = verify_on_host(timed, store, limits, steps)
    return RunPlan(build, verified, store, suite, results, limits, canary=canary, profile=profile, exam=exam)


def raise_first(ended: Mapping[str, Ended[Path]], steps: Steps) -> None:
    """Raise the error of the first job that failed, after a note for each; returns if none failed."""
    failed = {name: one.error for name, one in ended.items() if one.error is not None}
    for name, error in failed.items() if len(ended) > 1 else ():
        steps.note(f"{name} was not measured: {type(error).__name__}: {error}")
    for error in failed.values():
        raise error
