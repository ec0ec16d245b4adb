"""The journal of a cost table: single layers' trials, one JSON line per sweep; an interrupted run resumes from it."""

import os
from pathlib import Path
from typing import Generic, TypeVar

from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_targets.trials.trial import Trial

Line = TypeVar("Line")


@record
class Timing:
    """One subject timed in one sweep; `site` is empty for the whole model, with which every site is compared."""

    sweep: int
    site: str
    subject: str
    trial: Trial


@record
class Sweep:
    """All that one process timed: one line of the journal."""

    number: int
    timings: tuple[Timing, ...]


class Lines(Generic[Line]):
    """An append-only file of records, one per line; a partial last line of a killed writer is cut off."""

    def __init__(self, kind: type[Line], path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_atomic(path, whole)
        self.lines = [decode(kind, line, where=f"{path}:{at}") for at, line in enumerate(whole.splitlines(), start=1)]

    def append(self, line: Line) -> None:
        """Add a record and return when it is on disk."""
        with self.path.open("ab") as stream:
            stream.write(encode(line).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.lines.append(line)


class Journal(Lines[Sweep]):
    """All sweeps of a table."""

    def __init__(self, path: Path) -> None:
        super().__init__(Sweep, path)

    @property
    def done(self) -> set[int]:
        """The numbers of the recorded sweeps."""
        return {sweep.number for sweep in self.lines}

    @property
    def timings(self) -> list[Timing]:
        """The timings of all sweeps."""
        return [timing for sweep in self.lines for timing in sweep.timings]
