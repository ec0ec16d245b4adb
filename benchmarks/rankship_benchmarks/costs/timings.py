"""Single layers' trials as they come, one JSON line per sweep: what a cost table is made of, and taken up again at."""

import os
from pathlib import Path
from typing import Generic, TypeVar

from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.records import record
from rankship_targets.trials.trial import Trial

Line = TypeVar("Line")


@record
class Timing:
    """One subject timed in one sweep; `site` is empty for the whole model, which every site is compared with."""

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
    """A file of records, one a line, that only grows; what a killed writer left of its last line is cut off."""

    def __init__(self, kind: type[Line], path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_atomic(path, whole)
        self.lines = [decode(kind, line, where=f"{path}:{at}") for at, line in enumerate(whole.splitlines(), start=1)]

    def append(self, line: Line) -> None:
        """Add a record and return when the disk has it."""
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
        """The numbers of the sweeps that are there."""
        return {sweep.number for sweep in self.lines}

    @property
    def timings(self) -> list[Timing]:
        """What all of them timed."""
        return [timing for sweep in self.lines for timing in sweep.timings]
