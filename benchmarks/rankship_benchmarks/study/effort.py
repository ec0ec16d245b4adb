"""What computing a cell takes, and under which conditions: seconds, processor time, the peak of memory."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rankship_pipeline import __version__
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.toolchain import hash_code, list_versions


@dataclass
class Effort:
    """Seconds of wall clock and of processor time, and the process's highest resident memory meanwhile, in bytes."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def watch_effort() -> Iterator[Effort]:
    """Yield a record that is filled when the block ends."""
    _reset_peak()
    effort, start, begun = Effort(), time.monotonic(), time.process_time()
    yield effort
    effort.seconds, effort.cpu_seconds = time.monotonic() - start, time.process_time() - begun
    effort.peak_bytes = _read_peak()


def _reset_peak() -> None:
    """Reset the kernel's peak of resident memory to what is resident now (proc(5), clear_refs)."""
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():
        raise InputError("a study records its peak memory, which this system does not show", hint="run it on Linux")
    mark.write_text("5", encoding="ascii")


def _read_peak() -> int:
    """Return the peak of resident memory (VmHWM) in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def describe_conditions() -> dict[str, str]:
    """Describe the code, the machine and the versions that a cell was computed with."""
    return {
        "rankship": __version__,
        "code": hash_code(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load before": f"{psutil.getloadavg()[0]:.1f}",
        **{f"version {name}": version for name, version in list_versions().items()},
    }
