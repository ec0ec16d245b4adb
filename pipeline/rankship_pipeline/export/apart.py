"""Exports several files at once, each in a process of its own, where that ends sooner and memory allows.

Each file needs one core from beginning to end: the converters' passes are Python. A process starts with nothing, so it
costs the imports of torch and a toolchain once more, and small models are exported in the process that asks.
"""

import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram

from rankship_pipeline.export.one_file import Failure
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BuildError, InputError, RankshipError, UnsupportedOp
from rankship_pipeline.foundation.formats import Format

_START_S = 12.0  # CPU seconds of a process that it would not take in this one: imports, and caches that begin empty
_GAIN = 0.75  # processes of their own must be done in this part of the time
_START_BYTES, _COPIES = 2**30, 8  # a process's memory: torch and a toolchain, and copies of the weights
_OWN_OPERATORS = {"aten", "prims"}
_POLL_S = 0.05
_SHOWN = 4000  # characters of a failed process's output
_ERRORS: dict[str, type[RankshipError]] = {one.__name__: one for one in (BuildError, InputError, UnsupportedOp)}


@dataclass(frozen=True)
class Job:
    """A file to write: a saved graph in one format. `title` names what is exported in progress and errors."""

    title: str
    graph: Path
    format_: Format
    file: Path

    @property
    def failure(self) -> Path:
        """The file with the error that ended its process."""
        return self.file.with_suffix(".failure")

    @property
    def log(self) -> Path:
        """The file with what its process printed."""
        return self.file.with_suffix(".log")


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    shown: ExitStack  # its step in the progress


def choose_workers(costs_s: Sequence[float], weights_bytes: int, cores: int, free_bytes: int) -> int:
    """The number of processes that export files of these CPU seconds at once; 1 if one process does it all as well.

    `weights_bytes` is the size of the largest model. A process is taken to need 1 GiB and eight copies of the weights.
    """
    workers = min(len(costs_s), cores, free_bytes // (_START_BYTES + _COPIES * weights_bytes))
    if workers <= 1:
        return 1
    together_s = max(max(costs_s) + _START_S, (sum(costs_s) + _START_S * len(costs_s)) / workers)
    return workers if together_s < _GAIN * sum(costs_s) else 1


def save_graph(graph: ExportedProgram, path: Path) -> bool:
    """Save a graph for another process; False, and no file, if it holds what only this process knows.

    Operators that a model registers itself are unknown elsewhere.
    """
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            namespace = getattr(node.target, "namespace", None)
            if namespace not in _OWN_OPERATORS:
                return False
    try:
        torch.export.save(graph, path)
    except Exception:  # noqa: BLE001 - what cannot be saved raises errors of any type
        path.unlink(missing_ok=True)
        return False
    return True


def export_apart(jobs: Sequence[Job], workers: int, threads: int, steps: Steps) -> Iterator[Job]:
    """Write the files of jobs, `workers` at once with `threads` each; yields each job when its file is finished.

    The first failure ends all other processes and is raised as it would be in this process; so does an interruption.
    BuildError says so if a process dies.
    """
    waiting, running = list(jobs), list[_Running]()
    with steps.side_by_side() as start:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(_start(waiting.pop(0), threads, start))
                ended = [one for one in running if one.process.poll() is not None]
                for one in ended:
                    running.remove(one)
                    with one.shown:
                        _raise_failure(one.job, one.process.returncode)
                    yield one.job
                if not ended:
                    time.sleep(_POLL_S)
        except BaseException as failure:
            for one in running:
                one.process.kill()
                one.process.wait()
                with suppress(type(failure)), one.shown:
                    raise failure  # noqa: TRY201 - to its step, which is not done
            raise


def _start(job: Job, threads: int, start: Callable[[str], Steps]) -> _Running:
    shown = ExitStack()
    shown.enter_context(start(job.title).step(f"export to {job.format_}"))
    program = [sys.executable, "-P", "-m", "rankship_pipeline.export.one_file"]  # -P: no module of the current folder
    with job.log.open("wb") as log:
        process = subprocess.Popen(
            [*program, job.graph, job.format_, job.file, job.failure],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
    return _Running(job, process, shown)


def _raise_failure(job: Job, status: int) -> None:
    """Raise the error that ended a job's process, after what it printed."""
    if status == 0:
        return
    sys.stderr.write(job.log.read_text(encoding="utf-8", errors="replace")[-_SHOWN:])
    if job.failure.is_file():
        said = decode(Failure, job.failure.read_bytes(), where=str(job.failure))
        raise _ERRORS.get(said.kind, BuildError)(said.message, hint=said.hint)
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    raise BuildError(
        f"the process that exports {job.title} to {job.format_} {how}",
        hint="if memory is full, stop other programs; finished files are kept, run the same command to resume",
    )
