"""The parity gate: each artifact, in its own runtime in a fresh process, against torch on the same inputs."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rankship_pipeline.export.runner import Array, Runner
from rankship_pipeline.foundation.errors import AgentDied, CommandFailed, Lacks, ParityFailed
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import Artifact, Verified
from rankship_pipeline.recipe.choices import ParityChoice


def verify_artifact(
    artifact: Artifact,
    path: Path,
    inputs: Sequence[Path],
    expected: Sequence[Path],
    runner: Runner,
    limits: ParityChoice,
) -> Verified:
    """Run and compare; anything but agreement is ParityFailed naming the format and the numbers.

    `path` is hashed first, so a stale, swapped or truncated file is found before its numbers are looked at.
    """
    where = f"{artifact.title} ({path.name})"
    refuse_changed(artifact, path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            output = runner.run(artifact.format, path, inputs, Path(folder))
        except (AgentDied, CommandFailed, Lacks) as failure:  # others are the way to a device, not the artifact
            raise ParityFailed(f"{where} does not run: {failure}", hint=failure.hint or "build it again") from failure
        got = [np.load(Path(name), allow_pickle=False) for name in output.outputs]
    want = [np.load(name, allow_pickle=False) for name in expected]
    verified = compare_outputs(artifact, got, want, runtime=output.runtime, version=output.runtime_version)
    complaints = list_complaints(verified, limits)
    if complaints:
        raise ParityFailed(
            f"{where} does not compute what torch computes: " + "; ".join(complaints),
            hint="nothing was pushed; build again, and if it persists report the operator as an exporter's fault",
        )
    return verified


def refuse_changed(artifact: Artifact, path: Path) -> None:
    """Raise ParityFailed unless the file is byte for byte the one that was built."""
    where = f"{artifact.title} ({path.name})"
    if not path.is_file():
        raise ParityFailed(f"{where}: the file is gone", hint="build it again")
    size = path.stat().st_size
    if size != artifact.size_bytes or hash_file(path) != artifact.sha256:
        raise ParityFailed(
            f"{where} is not the file that was built: {size:,} bytes on disk, {artifact.size_bytes:,} built,"
            f" expected sha256 {artifact.sha256[:12]}…",
            hint=f"delete {path.parent} and build again",
        )


def compare_outputs(
    artifact: Artifact, got: Sequence[Array], want: Sequence[Array], *, runtime: str, version: str
) -> Verified:
    """The measures of `Verified`; outputs of another number or shape, or not finite, are ParityFailed at once."""
    where = artifact.title
    if [a.shape for a in got] != [b.shape for b in want]:
        raise ParityFailed(
            f"{where}: outputs of shape {[a.shape for a in got]}, torch gives {[b.shape for b in want]}",
            hint="build it again",
        )
    if not all(np.isfinite(a).all() for a in got):
        raise ParityFailed(f"{where}: the outputs hold NaN or infinity", hint="build it again")
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(got, want, strict=True)]
    return Verified(
        artifact_sha256=artifact.sha256,
        variant=artifact.variant,
        format=artifact.format,
        runtime=runtime,
        runtime_version=version,
        samples=len(want[0]),
        max_relative_error=max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs),
        min_cosine=min(float(_cosines(a, b).min()) for a, b in pairs),
        top1_agreement=float((pairs[0][0].argmax(-1) == pairs[0][1].argmax(-1)).mean()),
        task=artifact.task,
    )


def _cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)  # (samples, values)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same_zero = (norms == 0) & (np.abs(a - b).max(axis=1) == 0)
    cosines: NDArray[np.float64] = np.where(same_zero, 1.0, (a * b).sum(1) / np.maximum(norms, 1e-300))
    return cosines


def list_complaints(verified: Verified, limits: ParityChoice) -> list[str]:
    """Each limit that is not met, with both numbers."""
    complaints = []
    if not verified.max_relative_error <= limits.max_relative_error:
        complaints.append(
            f"relative max error {verified.max_relative_error:.2e}, allowed {limits.max_relative_error:.2e}"
        )
    if not verified.min_cosine >= limits.min_cosine:
        complaints.append(f"cosine {verified.min_cosine:.6f}, at least {limits.min_cosine}")
    if not verified.top1_agreement >= limits.min_top1_agreement:
        complaints.append(f"top-1 agreement {verified.top1_agreement:.3f}, at least {limits.min_top1_agreement}")
    return complaints
