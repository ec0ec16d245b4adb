"""Runs several devices at once, each in a thread with one job at a time; a lost device does not stop the others."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from rankship_benchmarks.fleet.schedule import Job, Outcome, Schedule
from rankship_pipeline.foundation.errors import RankshipError, TargetError, TransientTargetError
from rankship_pipeline.foundation.frozen import record

Result = TypeVar("Result")
# Pauses before a lost device is tried again, one retry each; afterwards it is given up. Only one retry: three failures
# in a row put a device in quarantine, which one bad night should not do.
PAUSES_S = (60.0,)


@record
class Ended(Generic[Result]):
    """How a job ended: its outcome, and its result if it was done, else the error that ended it."""

    outcome: Outcome
    result: Result | None
    error: RankshipError | None


class _Fleet(Generic[Result]):
    """The state that the threads share; every change is made under `changed`."""

    def __init__(self, jobs: Sequence[Job], work: Callable[[str, Job], Result], pauses_s: Sequence[float]) -> None:
        devices = [device for job in jobs for device in job.devices]
        self.schedule = Schedule(jobs, devices)
        self.devices = tuple(dict.fromkeys(devices))
        self.changed = threading.Condition()
        self.results: dict[str, Result] = {}
        self.errors: dict[str, RankshipError] = {}
        self.crash: BaseException | None = None
        self.stopped = False
        self._work = work
        self._pauses_s = pauses_s

    def serve(self, device: str) -> None:
        """Do jobs until none is left for this device."""
        try:
            self._serve(device)
        except BaseException as crash:  # noqa: BLE001 - a mistake in the program: the caller's thread raises it
            with self.changed:
                self.crash = self.crash or crash
                self.changed.notify_all()

    def _serve(self, device: str) -> None:
        losses = 0
        while (job := self._await_job(device)) is not None:
            try:
                result = self._work(device, job)
            except TargetError as failure:
                patient = isinstance(failure, TransientTargetError) and losses < len(self._pauses_s)
                self._lose(device, job, failure, pause_s=self._pauses_s[losses] if patient else None)
                losses += 1
            except RankshipError as failure:
                with self.changed:
                    self.errors[job.name] = failure
                    self.schedule.fail(device, str(failure))
                    self.changed.notify_all()
            else:
                losses = 0
                with self.changed:
                    self.results[job.name] = result
                    self.schedule.finish(device)
                    self.changed.notify_all()

    def _await_job(self, device: str) -> Job | None:
        with self.changed:
            while not (self.stopped or self.schedule.finished):
                job = self.schedule.take(device)
                if job is not None:
                    return job
                self.changed.wait()
            return None

    def _lose(self, device: str, job: Job, failure: TargetError, pause_s: float | None) -> None:
        with self.changed:
            self.errors[job.name] = failure
            self.schedule.lose(device, f"{type(failure).__name__}: {failure}")
            if pause_s is None:
                self.schedule.give_up(device, f"{type(failure).__name__}: {failure}")
            self.changed.notify_all()
            if pause_s is not None:
                self.changed.wait_for(lambda: self.stopped or self.schedule.finished, timeout=pause_s)
                self.schedule.restore(device)
                self.changed.notify_all()


def run_fleet(
    jobs: Sequence[Job], work: Callable[[str, Job], Result], *, pauses_s: Sequence[float] = PAUSES_S
) -> Mapping[str, Ended[Result]]:
    """Do every job by `work(device, job)`; returns how each ended, in the jobs' order.

    A device that cannot do its job (TargetError) is lost: its job goes to a twin, or waits until the device is tried
    again, once after each of `pauses_s`. A device whose error is not transient is given up at once. Any other
    RankshipError ends that job alone; after a mistake in the program no new job begins. An interruption leaves the
    threads of several devices as they are: their trials are found again as after a killed process.
    """
    fleet: _Fleet[Result] = _Fleet(jobs, work, pauses_s)
    if len(fleet.devices) == 1:  # in the caller's thread, so that an interruption closes its session
        fleet.serve(fleet.devices[0])
    else:
        _run_threads(fleet)
    if fleet.crash is not None:
        raise fleet.crash
    return list_ended(jobs, fleet.schedule, fleet.results, fleet.errors)


def _run_threads(fleet: _Fleet[Result]) -> None:
    threads = [threading.Thread(target=fleet.serve, args=(name,), name=name, daemon=True) for name in fleet.devices]
    for thread in threads:
        thread.start()
    with fleet.changed:
        try:
            fleet.changed.wait_for(lambda: fleet.schedule.finished or fleet.crash is not None)
        finally:
            fleet.stopped = True
            fleet.changed.notify_all()
    for thread in threads:  # after a mistake in the program too, so that other devices end cleanly
        thread.join()


def list_ended(
    jobs: Sequence[Job], schedule: Schedule, results: Mapping[str, Result], errors: Mapping[str, RankshipError]
) -> dict[str, Ended[Result]]:
    """Return how each job ended, in order, once a schedule is finished."""
    return {
        job.name: Ended(
            outcome=schedule.outcomes[job.name],
            result=results.get(job.name),
            error=_find_error(schedule.outcomes[job.name], errors),
        )
        for job in jobs
    }


def _find_error(outcome: Outcome, errors: Mapping[str, RankshipError]) -> RankshipError | None:
    """Return the error that ended a job: its own, else that of the devices that could have done it."""
    if outcome.failure is None:
        return None
    return errors.get(outcome.job.name) or TargetError(outcome.failure, hint="check the devices named above")
