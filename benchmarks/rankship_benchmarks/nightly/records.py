"""The records of a nightly: one small file for each night, by number, with the result of every device.

    <results>/nights/000012.json    rewritten as each device ends; `finished_utc` is null until the night is over

Nights are ordered by their number and never by a clock, which may be set back.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from rankship_benchmarks.bundle.bundle import BUNDLE_FILE, open_bundle
from rankship_benchmarks.judge.changes import Explanation
from rankship_benchmarks.nightly.repository import Commit
from rankship_benchmarks.stats.estimates import Estimate
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record

_FOLDER, _LOCK_FILE = "nights", ".nightly"
_LONGEST_NIGHT_S = 20 * 3600


@record
class CaseVerdict:
    """The verdict on one artifact on one device, against the last night that counted.

    `verdict` is better, worse, same or unknown; `ratio` is tonight's latency (or energy) over that night's, None if
    they were not compared. `step` describes a lasting change that was found tonight. `why` is what differs between the
    two nights, for a case that is worse.
    """

    key: ArtifactKey
    verdict: str
    reason: str
    ratio: Estimate | None = None
    step: str | None = None
    why: Explanation | None = None


@record
class DeviceNight:
    """The result of one device in one night.

    `run` is the folder of its bundle, None if it could not be measured. `gap` says why the night does not count for it
    (None: it counts), `error` is the class name of the error. `measured_on` is the twin that stood in, else the device
    itself. `energies` are the verdicts on energy, empty if nothing was metered.
    """

    device: str
    measured_on: str | None
    run: str | None
    gap: str | None
    error: str | None
    losses: tuple[str, ...]
    cases: tuple[CaseVerdict, ...]
    energies: tuple[CaseVerdict, ...] = ()

    @property
    def shown(self) -> str:
        """The name of the device whose numbers these are."""
        return self.measured_on or self.device


@record
class NightRecord:
    """One night: what was planned, and the results. `failure` is the error that ended it before any device was reached.

    `strangers` are the runs that were in the folder when the night began and belong to no night; it never adopts them.
    `commit` is that of the user's repository, None without `--git`.
    """

    number: int
    suite: str
    suite_sha256: str
    recipe: str
    build_sha256: str | None
    started_utc: str
    finished_utc: str | None
    asked: tuple[str, ...]
    devices: tuple[DeviceNight, ...]
    failure: str | None
    exit_code: int | None
    strangers: tuple[str, ...] = ()
    commit: Commit | None = None

    def find(self, device: str) -> DeviceNight | None:
        """Find the result of one device; None if there is none yet."""
        return next((one for one in self.devices if one.device == device), None)


@contextmanager
def holding(results: Path) -> Iterator[bool]:
    """Lock the results folder for one nightly; yields False if another holds it. The lock ends with its process."""
    lock = FileLock(results / _LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def list_nights(results: Path) -> list[NightRecord]:
    """Read every night in order; InputError for a damaged file, because files are never written in part."""
    paths = sorted((results / _FOLDER).glob("[0-9]*.json"))
    return [decode(NightRecord, path.read_bytes(), where=str(path)) for path in paths]


def write_night(results: Path, night: NightRecord) -> Path:
    """Write one night's file; returns its path."""
    path = results / _FOLDER / f"{night.number:06}.json"
    write_atomic(path, encode(night).encode() + b"\n")
    return path


def begin_night(
    results: Path, nights: Sequence[NightRecord], suite: tuple[str, str], recipe: str, asked: Sequence[str]
) -> NightRecord:
    """Resume the last night if it never ended and had the same plan; else close it and begin a new one.

    `suite` is its name and digest. A night that began more than 20 hours off, in either direction, is not resumed.
    """
    now = datetime.now(UTC)
    last = nights[-1] if nights else None
    if last is not None and last.finished_utc is None:
        near = abs((now - datetime.fromisoformat(last.started_utc)).total_seconds()) < _LONGEST_NIGHT_S
        if near and (last.suite_sha256, last.recipe, last.asked) == (suite[1], recipe, tuple(asked)):
            return last
        close_interrupted(results, last)
    night = NightRecord(
        number=1 + (last.number if last else 0),
        suite=suite[0],
        suite_sha256=suite[1],
        recipe=recipe,
        build_sha256=None,
        started_utc=now.isoformat(timespec="seconds"),
        finished_utc=None,
        asked=tuple(asked),
        devices=(),
        failure=None,
        exit_code=None,
        strangers=tuple(sorted(_list_runs(results) - list_known(nights))),
    )
    write_night(results, night)
    return night


def list_known(nights: Iterable[NightRecord]) -> set[str]:
    """Return the folders of all runs that belong to a night."""
    return {one.run for night in nights for one in night.devices if one.run}


def _list_runs(results: Path) -> set[str]:
    return {path.parent.name for path in results.glob(f"[!.]*/{BUNDLE_FILE}")}


def find_own_run(results: Path, night: NightRecord, device: str, known: Container[str]) -> str | None:
    """Find the finished run of a device that this night made, but did not record before it was interrupted."""
    for folder in sorted(_list_runs(results) - set(night.strangers)):
        with suppress(InputError):  # the index reports damaged bundles
            bundle = open_bundle(results / folder)
            wanted = (bundle.header.device, bundle.header.build_sha256) == (device, night.build_sha256)
            if wanted and bundle.finished and folder not in known:
                return folder
    return None


def close_interrupted(results: Path, night: NightRecord) -> None:
    """End a night that was interrupted and not resumed: devices that it had not measured are gaps."""
    missing = tuple(
        DeviceNight(
            device=name, measured_on=None, run=None, gap="interrupted", error="Interrupted", losses=(), cases=()
        )
        for name in night.asked
        if night.find(name) is None
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_night(results, replace(night, devices=(*night.devices, *missing), finished_utc=now, exit_code=130))


def put_device(night: NightRecord, one: DeviceNight) -> NightRecord:
    """Return the night with one device's record added or replaced, in the planned order."""
    found = {old.device: old for old in night.devices} | {one.device: one}
    return replace(night, devices=tuple(found[name] for name in night.asked if name in found))
