"""Single layers' trials as they come, one JSON line per sweep: what a cost table is made of, and taken up again at."""

import os
from pathlib import Path

from rankship_pipeline.codec import decode, encode
from rankship_pipeline.files import write_atomic
from rankship_pipeline.records import record
from rankship_targets.trial import Trial


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


class Journal:
    """A file of sweeps that only grows; what a killed writer left of its last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_atomic(path, whole)
        sweeps = [decode(Sweep, line, where=f"{path}:{at}") for at, line in enumerate(whole.splitlines(), start=1)]
        self.done = {sweep.number for sweep in sweeps}
        self.timings = [timing for sweep in sweeps for timing in sweep.timings]

    def append(self, sweep: Sweep) -> None:
        """Add a sweep and return when the disk has it."""
        with self.path.open("ab") as stream:
            stream.write(encode(sweep).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.done.add(sweep.number)
        self.timings += sweep.timings
