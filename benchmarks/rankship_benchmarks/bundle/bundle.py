"""A run's results: one folder with one append-only file of JSON lines, readable after any crash.

    <results>/<run_id>/trials.jsonl     lines of the kinds header, trial*, metered*, aggregate*, end?

A writer killed in mid-line leaves a partial last line. Readers ignore exactly that, and the next append cuts it off. A
wrong line anywhere else is an error, because a crash does not cause it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from rankship_benchmarks.bundle.delegated import Delegated
from rankship_benchmarks.bundle.suite import EnergyPlan
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import publish_folder
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Artifact, Build, Verified
from rankship_targets.devices.device import THIS_MACHINE
from rankship_targets.trials.aggregate import Aggregate
from rankship_targets.trials.trial import MeteredTrial, Trial

BUNDLE_FILE = "trials.jsonl"
_LOCK_FILE = ".writing"
# conditions: of an emulated device, what it stands for; of files that generate, how their phases are timed
STAND_IN, TIMED_TOKENS = "stand-in", "timed tokens"


@record
class Header:
    """What a run measures and what made it; `conditions` are texts (kernel, CPU), shown as they are.

    `created_utc` is ISO 8601. `build_sha256` is the digest of `build`, which is kept whole so that a bundle can be
    read when the build is gone. `verified` are the host's proofs, `verified_on_device` those of the device's own
    runtimes: empty if the device is the host itself, and in bundles of releases that did not compare there.
    `rounds` is the suite's number. `canary` is the reference model timed in each round, None if the suite has none; its
    proofs are among the others. `energy` is how a meter is read, None if the suite has no energy. `delegated` is what
    delegates take on the device: of no file in bundles of releases that did not look.
    """

    run_id: str
    created_utc: str
    suite_sha256: str
    recipe: str
    recipe_sha256: str
    build_sha256: str
    device: str
    build: Build
    verified: tuple[Verified, ...]
    rounds: int
    conditions: dict[str, str]
    rankship_version: str
    verified_on_device: tuple[Verified, ...] = ()
    canary: Artifact | None = None
    energy: EnergyPlan | None = None
    delegated: tuple[Delegated, ...] = ()

    def list_proofs(self) -> list[tuple[Verified, ...]]:
        """Return the proofs of each place: this host's, then the device's, if it is another machine."""
        if self.device == THIS_MACHINE:
            return [(*self.verified, *self.verified_on_device)]
        return [self.verified, self.verified_on_device]


@record
class End:
    """The run's last line: how many trials it holds, of each kind, so that a lost one is noticed."""

    trials: int
    finished_utc: str
    metered: int = 0
    aggregates: int = 0


@record
class Bundle:
    """One run, read from its folder; `finished` is False while trials may still be appended.

    `metered` are the trials that a meter watched; their times are no latencies. `aggregates` have no samples at all.
    """

    header: Header
    trials: tuple[Trial, ...]
    finished: bool
    metered: tuple[MeteredTrial, ...] = ()
    aggregates: tuple[Aggregate, ...] = ()


def create_bundle(folder: Path, header: Header) -> None:
    """Start a run: `folder` appears with its header already on disk, or not at all."""
    if folder.exists():
        raise InputError(f"{folder} exists: a run's folder is written once", hint="choose another run id")
    with publish_folder(folder) as private:
        (private / BUNDLE_FILE).write_bytes(_line("header", header))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Lock a bundle for appending; InputError at once if another process holds it. The lock ends with its process."""
    lock = FileLock(folder / _LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"{folder}: another run is writing here", hint="wait until it ends, or end that process first"
        ) from None
    try:
        yield
    finally:
        lock.release()


def append_trial(folder: Path, trial: Trial) -> None:
    """Add one trial and flush it to disk; call it inside `writing(folder)`."""
    _append(folder / BUNDLE_FILE, _line("trial", trial))


def append_metered(folder: Path, metered: MeteredTrial) -> None:
    """Add one trial with its power trace and flush it to disk; call it inside `writing(folder)`."""
    _append(folder / BUNDLE_FILE, _line("metered", metered))


def append_aggregate(folder: Path, aggregate: Aggregate) -> None:
    """Add one run of a program that gives no samples, and flush it to disk; call it inside `writing(folder)`."""
    _append(folder / BUNDLE_FILE, _line("aggregate", aggregate))


def finish_bundle(folder: Path) -> None:
    """Add the end line, after which nothing can be appended; call it inside `writing(folder)`."""
    bundle = open_bundle(folder)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    trials, metered, aggregates = len(bundle.trials), len(bundle.metered), len(bundle.aggregates)
    end = End(trials=trials, finished_utc=now, metered=metered, aggregates=aggregates)
    _append(folder / BUNDLE_FILE, _line("end", end))


def open_bundle(folder: Path) -> Bundle:
    """Read a run, finished or not, without a partial last line; InputError if it is damaged."""
    path = folder / BUNDLE_FILE
    header: Header | None = None
    trials: list[Trial] = []
    end: End | None = None
    metered: list[MeteredTrial] = []
    aggregates: list[Aggregate] = []
    seen: set[tuple[str, int, ArtifactKey]] = set()
    for number, line in enumerate(_whole_lines(_read(path)), start=1):
        where = f"{path}:{number}"
        kind, text = _split(line, where)
        if (kind == "header") != (number == 1) or end is not None:
            raise InputError(f"{where}: a {kind} line is out of place", hint=_DAMAGED)
        if kind == "header":
            header = decode(Header, text, where=where)
        elif kind == "trial":
            trials.append(decode(Trial, text, where=where))
            _refuse_second(kind, trials[-1], seen, where)
        elif kind == "metered":
            metered.append(_decode_metered(text, where))
            _refuse_second(kind, metered[-1].trial, seen, where)
        elif kind == "aggregate":
            aggregates.append(decode(Aggregate, text, where=where))
            _refuse_second(kind, aggregates[-1], seen, where)
        else:
            end = decode(End, text, where=where)
    if header is None:
        raise InputError(f"{path}: no header line", hint="delete the folder, run again")
    held = len(trials), len(metered), len(aggregates)
    if end is not None and (end.trials, end.metered, end.aggregates) != held:
        stated = f"{end.trials} and {end.metered}" + (f" and {end.aggregates}" if end.aggregates != held[2] else "")
        message = f"{path}: holds {held[0]} trials and {held[1]} metered ones, its end line says {stated}"
        raise InputError(message, hint=_DAMAGED)
    return Bundle(
        header=header,
        trials=tuple(trials),
        finished=end is not None,
        metered=tuple(metered),
        aggregates=tuple(aggregates),
    )


def _refuse_second(kind: str, trial: Trial | Aggregate, seen: set[tuple[str, int, ArtifactKey]], where: str) -> None:
    place = (kind, trial.round, trial.key)
    if place in seen:
        raise InputError(f"{where}: {trial.key.title} round {trial.round} again", hint=_DAMAGED)
    seen.add(place)


def _decode_metered(text: str, where: str) -> MeteredTrial:
    """Read a trial and its trace; InputError if the trace does not have the recorded hash."""
    metered = decode(MeteredTrial, text, where=where)
    if digest(metered.trace) != metered.trace_sha256:
        raise InputError(f"{where}: the power trace does not have the hash recorded beside it", hint=_DAMAGED)
    return metered


def find_cases(bundle: Bundle) -> dict[ArtifactKey, Artifact]:
    """Return the artifact of every case with trials, under the key of the case; the canary is none."""
    known = {one.key: one for one in bundle.header.build.artifacts}
    timed = dict.fromkeys(trial.key for trial in bundle.trials)
    return {key: replace(known[key.exported], key=key) for key in timed if key.exported in known}


def find_unfinished(results_dir: Path, suite_sha256: str, build_sha256: str, device: str) -> Path | None:
    """Find the newest folder of an unfinished run of the same suite and build on the same device; None if none."""
    found: list[tuple[str, Path]] = []
    for path in results_dir.glob(f"*/{BUNDLE_FILE}"):
        wanted = {"suite_sha256": suite_sha256, "build_sha256": build_sha256, "device": device}
        # Read three keys of the header first: a damaged bundle of another suite must not stop this run.
        if wanted.items() <= _peek(path).items():
            bundle = open_bundle(path.parent)
            if not bundle.finished:
                found.append((bundle.header.created_utc, path.parent))
    return max(found)[1] if found else None


_DAMAGED = "a crash does not cause this: restore the file from a copy, or delete the folder and measure again"
_KINDS = ("header", "trial", "metered", "aggregate", "end")


def _line(kind: str, thing: Header | Trial | MeteredTrial | Aggregate | End) -> bytes:
    return f'{{"kind":"{kind}",{encode(thing)[1:]}\n'.encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file", hint="give the folder of one run; it holds trials.jsonl") from None


def _whole_lines(data: bytes) -> list[bytes]:
    """Return the complete lines; a last line without a newline, or that is not JSON, is left out."""
    *lines, tail = data.split(b"\n")
    if not tail and lines and _parse(lines[-1]) is None:
        lines.pop()
    return lines


def _parse(line: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _split(line: bytes, where: str) -> tuple[str, str]:
    """Split a line into its kind and the JSON of the record without it."""
    value = _parse(line)
    if value is None:
        raise InputError(f"{where}: not a JSON object", hint=_DAMAGED)
    kind = value.pop("kind", None)
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        raise InputError(
            f"{where}: unknown kind {kind!r}, expected one of {known}", hint="read it with a newer rankship"
        )
    return str(kind), json.dumps(value)


def _peek(path: Path) -> dict[str, object]:
    with path.open("rb") as stream:
        return _parse(stream.readline()) or {}


def _append(path: Path, line: bytes) -> None:
    """Cut off a partial last line, add `line`, and return when it is on disk."""
    lines = _whole_lines(_read(path))
    if lines and _split(lines[-1], f"{path}:{len(lines)}")[0] == "end":
        raise InputError(f"{path}: this run is finished", hint="start a new run")
    with path.open("r+b") as stream:
        stream.truncate(sum(len(whole) + 1 for whole in lines))
        stream.seek(0, os.SEEK_END)
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())
