"""Accuracy on the device: a part of the test set in each case's own runtime there, beside the host's on the same part.

Kernels differ, and parity is proven on few inputs. The host runs the same file as its runtime does by itself, so that
what differs is the device. Kept in the run's folder; no latency is taken from it.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quality import Score
from rankship_pipeline.foundation.records import Artifact
from rankship_targets.session.runner import DeviceRunner, HostRunner
from rankship_targets.session.session import Session

if TYPE_CHECKING:
    from torch import Tensor

    from rankship_benchmarks.measure.exam import Exam

_FILE = "accuracy.json"
_BLOCK = 256  # samples that one process runs: a slow device must be done with them in ten minutes


@record
class DeviceScore:
    """One case's score on the device and the host's, both on `samples` of the test set's `of` inputs.

    `differing` is how many of the `answers` choose another class there; None where outputs hold no classes' scores.
    """

    key: ArtifactKey
    samples: int
    of: int
    host: Score
    device: Score
    differing: int | None
    answers: int


@record
class DeviceScores:
    """The scores of every case of a run on its device."""

    scores: tuple[DeviceScore, ...]


def examine_device(
    folder: Path,
    cases: Sequence[Artifact],
    plan: RunPlan,
    remote: Mapping[str, str],
    session: Session,
    steps: Steps,
) -> None:
    """Run the plan's exam with every case, once a run; `remote` has paths on the device by SHA-256."""
    exam, threads = plan.exam, plan.suite.threads
    if exam is None or (folder / _FILE).exists():
        return
    scores, host = [], HostRunner(threads)
    at_home: dict[str, list[Tensor]] = {}
    for case in (one for one in cases if one.key.variant != "canary"):
        with steps.step(f"score {case.key.title} on {session.device.name}, {len(exam.labels)} test inputs"):
            path = plan.store.root / case.file
            if case.sha256 not in at_home:
                at_home[case.sha256] = _run(host, case, path, exam)
            there = _run(DeviceRunner(session, threads, remote, case.key.asked), case, path, exam)
            scores.append(_compare(case.key, exam, at_home[case.sha256], there, session.device.name))
    write_atomic(folder / _FILE, encode(DeviceScores(scores=tuple(scores))).encode())


def read_device_scores(folder: Path) -> tuple[DeviceScore, ...]:
    """Read a run's scores on its device; none if none were asked for."""
    with suppress(FileNotFoundError):
        return decode(DeviceScores, (folder / _FILE).read_bytes(), where=str(folder / _FILE)).scores
    return ()


def _compare(key: ArtifactKey, exam: "Exam", host: "list[Tensor]", there: "list[Tensor]", device: str) -> DeviceScore:
    chosen, wanted = exam.choose(there), exam.choose(host)
    return DeviceScore(
        key=key,
        samples=len(exam.labels),
        of=exam.of,
        host=exam.score(host, f"{key.title} on this host"),
        device=exam.score(there, f"{key.title} on {device}"),
        differing=None if chosen is None or wanted is None else int((chosen != wanted).sum()),
        answers=len(chosen) if chosen is not None else len(exam.labels),
    )


def _run(runner: HostRunner | DeviceRunner, case: Artifact, path: Path, exam: "Exam") -> "list[Tensor]":
    """Run a file on the exam's inputs; returns its outputs, samples first."""
    import torch

    parts = []
    for begin in range(0, len(exam.labels), _BLOCK):
        with TemporaryDirectory() as name:
            inputs = [Path(name) / f"input.{place}.npy" for place in range(len(exam.inputs))]
            for file, tensor in zip(inputs, exam.inputs, strict=True):
                np.save(file, tensor[begin : begin + _BLOCK].contiguous().numpy())
            made = runner.run(case.key.format, path, inputs, Path(name))
            parts.append([np.load(one, allow_pickle=False) for one in made.outputs])
    return [torch.from_numpy(np.concatenate(blocks)) for blocks in zip(*parts, strict=True)]
