"""One night: measure every device, compare each with its last night that counts, look for steps, write the page.

Nothing here builds or talks to a device: the verb passes in the functions that do.
"""

import errno
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rankship_benchmarks.bundle.bundle import BUNDLE_FILE, finish_bundle, open_bundle, writing
from rankship_benchmarks.fleet.measure import Measure, measure_devices
from rankship_benchmarks.fleet.schedule import Job, list_devices
from rankship_benchmarks.fleet.threads import PAUSES_S, Ended
from rankship_benchmarks.nightly.explain import Evidence
from rankship_benchmarks.nightly.judge import judge_device, state_exit
from rankship_benchmarks.nightly.records import (
    DeviceNight,
    NightRecord,
    begin_night,
    close_interrupted,
    find_own_run,
    holding,
    list_known,
    list_nights,
    put_device,
    write_night,
)
from rankship_benchmarks.nightly.repository import read_commit
from rankship_benchmarks.rack.tickets import drop_tickets
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, RankshipError

# Builds and verifies; returns the build's digest and the function that measures one device.
Prepare = Callable[[], tuple[str, Measure]]
_HOST_FULL = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT}


@dataclass(frozen=True)
class Tonight:
    """What to measure tonight; `suite` is the suite's name and digest, `repository` the folder that `--git` names."""

    results: Path
    suite: tuple[str, str]
    recipe: str
    jobs: Sequence[Job]
    pauses_s: Sequence[float] = PAUSES_S
    repository: Path | None = None


def run_night(tonight: Tonight, prepare: Prepare, steps: Steps) -> NightRecord | None:
    """Do one night, or the rest of an interrupted one; None if another nightly holds the results folder.

    InputError on a full disk: what was measured is kept, and the next call resumes.
    """
    try:
        with holding(tonight.results) as held:
            return _run(tonight, prepare, steps) if held else None
    except OSError as failure:
        if failure.errno not in _HOST_FULL:
            raise
        message = f"{tonight.results}: {failure.strerror}"
        raise InputError(message, hint="make room or grant access there; the same command then resumes") from None


def _run(tonight: Tonight, prepare: Prepare, steps: Steps) -> NightRecord:
    asked = [job.name for job in tonight.jobs]
    commit = None if tonight.repository is None else read_commit(tonight.repository)
    night = begin_night(tonight.results, list_nights(tonight.results), tonight.suite, tonight.recipe, asked)
    try:
        build_sha256, measure = prepare()
    except RankshipError as failure:
        write_night(tonight.results, _finish(replace(night, failure=str(failure)), failure.exit_code))
        raise
    if night.build_sha256 not in {
        None,
        build_sha256,
    }:  # the build changed since the night was interrupted: begin a new one
        close_interrupted(tonight.results, night)
        nights = list_nights(tonight.results)
        night = begin_night(tonight.results, nights, tonight.suite, tonight.recipe, asked)
    if night.build_sha256 is None:
        close_left_over(tonight)
        night = replace(night, build_sha256=build_sha256, commit=commit)
        write_night(tonight.results, night)
    night = _measure(tonight, night, measure, steps)
    return _judge(tonight, night, steps)


def close_left_over(tonight: Tonight) -> None:
    """End the runs that an earlier night left unfinished: one run never mixes trials of two nights."""
    devices = list_devices(tonight.jobs)
    for path in tonight.results.glob(f"[!.]*/{BUNDLE_FILE}"):
        with suppress(InputError):  # the index reports damaged bundles
            bundle = open_bundle(path.parent)
            ours = bundle.header.device in devices and bundle.header.recipe == tonight.recipe
            if ours and not bundle.finished:
                with writing(path.parent):
                    finish_bundle(path.parent)
    drop_tickets(tonight.results, tonight.recipe, devices)


def _measure(tonight: Tonight, night: NightRecord, measure: Measure, steps: Steps) -> NightRecord:
    """Measure every device that has no run tonight yet; the night's file is rewritten as each one ends."""
    state = night
    lock = threading.Lock()  # each device's thread calls `note`

    def note(name: str, device: str, folder: Path) -> None:
        nonlocal state
        one = DeviceNight(device=name, measured_on=device, run=folder.name, gap=None, error=None, losses=(), cases=())
        with lock:
            state = put_device(state, one)
            write_night(tonight.results, state)

    waiting = [job for job in tonight.jobs if (old := night.find(job.name)) is None or old.run is None]
    for job in list(waiting):
        known = list_known([*list_nights(tonight.results), state])
        for device in job.devices:
            own = find_own_run(tonight.results, night, device, known) if job in waiting else None
            if own is not None:
                note(job.name, device, tonight.results / own)
                waiting.remove(job)

    ended = measure_devices(waiting, measure, steps, ended=note, pauses_s=tonight.pauses_s)
    for name, one in ended.items():
        state = put_device(state, _describe(name, one))
        if one.error is not None:
            steps.note(f"{name} was not measured: {type(one.error).__name__}: {one.error}")
    write_night(tonight.results, state)
    return state


def _describe(name: str, ended: Ended[Path]) -> DeviceNight:
    return DeviceNight(
        device=name,
        measured_on=ended.outcome.device if ended.error is None else None,
        run=ended.result.name if ended.result is not None else None,
        gap=None if ended.error is None else f"{type(ended.error).__name__}: {ended.error}",
        error=None if ended.error is None else type(ended.error).__name__,
        losses=ended.outcome.losses,
        cases=(),
    )


def _judge(tonight: Tonight, night: NightRecord, steps: Steps) -> NightRecord:
    from rankship_benchmarks.index.index import refresh_own_index
    from rankship_benchmarks.nightly.figures import read_figures
    from rankship_benchmarks.nightly.histories import list_histories
    from rankship_benchmarks.nightly.page import write_page

    with steps.step("compare with the nights before"):
        engine = refresh_own_index(tonight.results)
        nights = [one for one in list_nights(tonight.results) if one.number < night.number]
        histories = list_histories(engine, [*nights, night])
        for one in night.devices:
            if one.run is not None:
                evidence = Evidence(tonight.results, [*nights, night], tonight.repository)
                night = put_device(night, judge_device(evidence, one, histories))
    finished = _finish(night, state_exit(night))
    write_night(tonight.results, finished)
    with steps.step("draw the page of all nights"):
        nights = list_nights(tonight.results)
        histories, figures = list_histories(engine, nights), read_figures(engine, nights)
        write_page(tonight.results, finished, nights, histories, figures)
    return finished


def _finish(night: NightRecord, exit_code: int) -> NightRecord:
    return replace(night, finished_utc=datetime.now(UTC).isoformat(timespec="seconds"), exit_code=exit_code)
