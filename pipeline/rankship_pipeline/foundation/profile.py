"""Records where a command's time and memory went, by stage and by layer, while a profile is asked for."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import psutil

from rankship_pipeline.foundation.frozen import record

_SAMPLED_SECONDS = 0.02
_WITH_CHILDREN = 10  # samples of the own memory to one of the subprocesses', which reads every process's parent
_RSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
_OFF = nullcontext()


@record
class StageProfile:
    """What one stage took, without the stages inside it.

    `cpu_seconds` count every thread and finished subprocess, `peak_bytes` is the resident memory of all processes at
    its highest. `layer_seconds` sums what its parts took by layer, most first; a thread each, so that layers side by
    side may sum to more than the stage. The estimates are those said before the build; None for a stage without.
    """

    name: str
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    layer_seconds: dict[str, float]
    estimated_seconds: float | None = None
    estimated_peak_bytes: int | None = None


@dataclass
class _Stage:
    """A stage that is running, or the sum of those of one name that ended."""

    name: str
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    inner_wall_seconds: float = 0.0
    inner_cpu_seconds: float = 0.0
    layer_seconds: dict[str, float] = field(default_factory=dict)


class Recording:
    """A profile while it is taken; stages may run in several threads."""

    def __init__(self) -> None:
        self.estimates: dict[str, tuple[float, int]] = {}  # seconds and peak bytes, by stage
        self._ended: dict[str, _Stage] = {}
        self._open: list[_Stage] = []
        self._own = threading.local()  # a thread's open stages, the innermost last
        self._process = psutil.Process()
        self._of_children = 0

    @contextmanager
    def follow(self, name: str) -> Iterator[None]:
        """Record what runs inside as a stage."""
        stage, above = _Stage(name), self._list_own()
        high_water = _read_high_water()
        wall, cpu = time.perf_counter(), read_cpu_seconds()
        above.append(stage)
        self._open.append(stage)
        self.sample()
        try:
            yield
        finally:
            self.sample()
            if _read_high_water() > high_water:  # the highest ever, so also where no sample fell on it
                stage.peak_bytes = max(stage.peak_bytes, _read_high_water())
            stage.wall_seconds, stage.cpu_seconds = time.perf_counter() - wall, read_cpu_seconds() - cpu
            above.remove(stage)
            self._open.remove(stage)
            if above:
                above[-1].inner_wall_seconds += stage.wall_seconds
                above[-1].inner_cpu_seconds += stage.cpu_seconds
            self._add(stage)

    @contextmanager
    def follow_layer(self, name: str) -> Iterator[None]:
        """Add the time that passes inside to a layer of the innermost stage."""
        stages = self._list_own() or self._open[-1:]  # a stage's own threads have none of their own
        begun = time.perf_counter()
        try:
            yield
        finally:
            for stage in stages[-1:]:
                stage.layer_seconds[name] = stage.layer_seconds.get(name, 0.0) + time.perf_counter() - begun

    def sample(self, *, with_children: bool = False) -> None:
        """Read the memory now and raise the open stages' peaks to it."""
        if with_children:
            self._of_children = sum(map(_read_memory, self._process.children(recursive=True)))
        now = _read_memory(self._process) + self._of_children
        for stage in list(self._open):
            stage.peak_bytes = max(stage.peak_bytes, now)

    def list_stages(self) -> tuple[StageProfile, ...]:
        """The stages that have ended."""
        return tuple(
            StageProfile(
                name=one.name,
                wall_seconds=one.wall_seconds - one.inner_wall_seconds,
                cpu_seconds=one.cpu_seconds - one.inner_cpu_seconds,
                peak_bytes=one.peak_bytes,
                layer_seconds=dict(sorted(one.layer_seconds.items(), key=lambda entry: -entry[1])),
                estimated_seconds=self.estimates.get(one.name, (None, None))[0],
                estimated_peak_bytes=self.estimates.get(one.name, (None, None))[1],
            )
            for one in self._ended.values()
        )

    def _list_own(self) -> list[_Stage]:
        if not hasattr(self._own, "stages"):
            self._own.stages = []
        stages: list[_Stage] = self._own.stages
        return stages

    def _add(self, stage: _Stage) -> None:
        whole = self._ended.setdefault(stage.name, _Stage(stage.name))
        whole.wall_seconds += stage.wall_seconds
        whole.cpu_seconds += stage.cpu_seconds
        whole.inner_wall_seconds += stage.inner_wall_seconds
        whole.inner_cpu_seconds += stage.inner_cpu_seconds
        whole.peak_bytes = max(whole.peak_bytes, stage.peak_bytes)
        for name, seconds in stage.layer_seconds.items():
            whole.layer_seconds[name] = whole.layer_seconds.get(name, 0.0) + seconds


_running: list[Recording] = []  # at most one; every thread's stages go to it


def stage(name: str) -> AbstractContextManager[None]:
    """Record what runs inside as a stage of the profile; nothing where none is taken."""
    return _running[-1].follow(name) if _running else _OFF


def layer(name: str) -> AbstractContextManager[None]:
    """Add the time that passes inside to a layer of the stage that runs; nothing where no profile is taken."""
    return _running[-1].follow_layer(name) if _running else _OFF


def note_estimates(estimates: dict[str, tuple[float, int]]) -> None:
    """Keep what the stages were estimated to take: (seconds, peak bytes) by name; nothing where no profile is taken."""
    for recording in _running:
        recording.estimates |= estimates


@contextmanager
def record_stages() -> Iterator[Recording]:
    """Take a profile of what runs inside."""
    recording, stop = Recording(), threading.Event()

    def watch() -> None:
        taken = 0
        while not stop.wait(_SAMPLED_SECONDS):
            recording.sample(with_children=taken % _WITH_CHILDREN == 0)
            taken += 1

    thread = threading.Thread(target=watch, name="profile", daemon=True)
    _running.append(recording)
    thread.start()
    try:
        yield recording
    finally:
        stop.set()
        thread.join()
        _running.remove(recording)


def _read_memory(process: psutil.Process) -> int:
    with suppress(psutil.Error):  # it has just ended
        return int(process.memory_info().rss)
    return 0


def _read_high_water() -> int:
    """The highest resident memory of this process ever; 0 on Windows, where samples alone tell."""
    with suppress(ImportError):
        import resource

        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * _RSS_BYTES
    return 0


def read_cpu_seconds() -> float:
    """The processor time of this process and its finished subprocesses, every thread, so far."""
    return sum(os.times()[:4])
