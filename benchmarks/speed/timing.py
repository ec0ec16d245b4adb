"""Times jobs in turn, by wall clock and CPU seconds, and finds their peak of memory; Linux alone."""

import gc
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speed.records import Figure, make_figure

Job = Callable[[], object]
CPU_EFFECT = 0.15  # the growth of CPU seconds that counts
RATIO_EFFECT = 0.10  # of a ratio to what ran beside it
MEMORY_EFFECT = 0.10


@dataclass(frozen=True)
class Spent:
    """What one run of a job took; CPU seconds are those of all threads and of ended child processes."""

    wall_s: float
    cpu_s: float


def spend(job: Job) -> Spent:
    """Run a job once and return what it took."""
    gc.collect()
    wall, cpu = time.monotonic(), _read_cpu_s()
    job()
    return Spent(wall_s=time.monotonic() - wall, cpu_s=_read_cpu_s() - cpu)


def spend_in_turn(jobs: Mapping[str, Job], rounds: int) -> dict[str, list[Spent]]:
    """Run all jobs once a round, one after the other, so that what slows the machine slows all of them."""
    spent: dict[str, list[Spent]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            spent[name].append(spend(job))
    return spent


def measure_peak(job: Job) -> int:
    """Return the peak of resident memory while a job runs, in bytes above what was resident before it.

    Run it before other jobs of the process, which leave memory behind that a job could take again unseen.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM to VmRSS
    before = read_memory("VmRSS")
    job()
    return max(0, read_memory("VmHWM") - before)


def read_memory(key: str) -> int:
    """Return a line of /proc/self/status in bytes: VmRSS, what is resident, or VmHWM, its peak."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [one for one in text.splitlines() if one.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def list_times(spent: Mapping[str, Sequence[Spent]], ours: str) -> list[Figure]:
    """Return every job's CPU and wall seconds, and the ratios of `ours` to each other job, round by round."""
    figures = []
    for name, rounds in spent.items():
        effect = CPU_EFFECT if name == ours else None
        figures += [
            make_figure(f"{name}_cpu_s", "s", [one.cpu_s for one in rounds], effect),
            make_figure(f"{name}_wall_s", "s", [one.wall_s for one in rounds]),
        ]
        if name != ours:
            pairs = list(zip(spent[ours], rounds, strict=True))
            cpu = [one.cpu_s / max(other.cpu_s, 1e-9) for one, other in pairs]
            wall = [one.wall_s / max(other.wall_s, 1e-9) for one, other in pairs]
            figures += [
                make_figure(f"over_{name}", "×, CPU", cpu, RATIO_EFFECT),
                make_figure(f"over_{name}_wall", "×, wall", wall),
            ]
    return figures


def list_peak(name: str, peak_bytes: int) -> Figure:
    """Return the figure of a peak of memory."""
    return make_figure(f"{name}_bytes", "bytes", [peak_bytes], MEMORY_EFFECT)


def _read_cpu_s() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in usages)
