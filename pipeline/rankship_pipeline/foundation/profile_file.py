"""Writes a command's profile to a file, and its largest stages to the terminal."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.console import start_table
from rankship_pipeline.foundation.files import ensure_writable, write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.profile import Recording, StageProfile, read_cpu_seconds, record_stages
from rankship_pipeline.foundation.units import show_bytes, show_seconds

_SHOWN = 8  # stages in the terminal


@record
class Profile:
    """A command's profile: its stages in the order in which they first ended, and everything together."""

    command: str
    cores: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    stages: tuple[StageProfile, ...]


@contextmanager
def profile_to(path: Path | None, command: str) -> Iterator[None]:
    """Write the profile of what runs inside to a file, also where it fails; nothing without a path."""
    if path is None:
        yield
        return
    ensure_writable(path.absolute().parent, "--profile")
    begun, spent = time.perf_counter(), read_cpu_seconds()
    with record_stages() as recording:
        try:
            with profile.stage("everything else"):
                yield
        finally:
            found = _summarise(recording, command, time.perf_counter() - begun, read_cpu_seconds() - spent)
            write_atomic(path, f"{encode(found)}\n".encode())
            _print(found, path, Console(stderr=True, highlight=False))


def _summarise(recording: Recording, command: str, wall_seconds: float, cpu_seconds: float) -> Profile:
    stages = recording.list_stages()
    return Profile(
        command=command,
        cores=os.cpu_count() or 1,
        wall_seconds=wall_seconds,
        cpu_seconds=cpu_seconds,
        peak_bytes=max(one.peak_bytes for one in stages),
        stages=stages,
    )


def _print(found: Profile, path: Path, console: Console) -> None:
    table = start_table("stage", "took", "estimated", "processors", "peak memory", "mostly for")
    largest = sorted(found.stages, key=lambda one: -one.wall_seconds)[:_SHOWN]
    for one in largest:
        estimated = "" if one.estimated_seconds is None else show_seconds(one.estimated_seconds)
        table.add_row(
            escape(one.name),
            show_seconds(one.wall_seconds),
            estimated,
            show_seconds(one.cpu_seconds),
            show_bytes(one.peak_bytes),
            escape(next(iter(one.layer_seconds), "")),
        )
    total = show_seconds(found.wall_seconds), "", show_seconds(found.cpu_seconds), show_bytes(found.peak_bytes), ""
    table.add_row("altogether", *total)
    console.print(table)
    console.print(f"profile: {path}", soft_wrap=True, markup=False)
