"""The parity gate: compares each artifact, in its own runtime in a fresh process, with torch on the same inputs."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rankship_pipeline.export.agreement import ROUNDED_TIE, find_agreement, find_cosine, find_error
from rankship_pipeline.export.artifact import Proof
from rankship_pipeline.export.runner import Array, Runner
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import AgentDied, CommandFailed, Lacks, ParityFailed
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import Artifact, TensorSpec, Verified
from rankship_pipeline.recipe.export_choices import ParityChoice

_TIE = 1e-5  # of the largest score: a smaller lead of one class over another is rounding
_FLIPS = 1.5  # of the difference that rounding activations makes, up to:
_MOST_ERROR, _LEAST_COSINE, _LEAST_AGREEMENT = 0.5, 0.9, 0.9


@dataclass(frozen=True)
class Agreement:
    """How closely one output agrees with torch's, in the measures of `Verified`."""

    output: str
    max_relative_error: float
    min_cosine: float
    top1_agreement: float | None


def verify_artifact(
    artifact: Artifact,
    path: Path,
    inputs: Sequence[Path],
    expected: Sequence[Path],
    runner: Runner,
    limits: ParityChoice,
    rows: int = 1,
) -> Verified:
    """Run the artifact and compare its outputs; ParityFailed with the format and the numbers unless they agree.

    `path` is hashed first, so that a stale, swapped or truncated file is found before it runs. The artifact takes
    `rows` samples at once. One that generates is given the prompt of its `generation`, then single tokens.
    """
    where = f"{artifact.key.title} ({path.name})"
    refuse_changed(artifact, path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            output = runner.run(artifact.key.format, path, inputs, Path(folder), rows, artifact.generation)
        except (AgentDied, CommandFailed, Lacks) as failure:  # other errors are the connection's, not the artifact's
            raise ParityFailed(f"{where} does not run: {failure}", hint=failure.hint or "build it again") from failure
        got = [np.load(Path(name), allow_pickle=False) for name in output.outputs]
    want = [np.load(name, allow_pickle=False) for name in expected]
    agreements = compare_outputs(artifact, got, want)
    if complaints := list(_list_complaints(agreements, fit_limits(limits, artifact))):
        raise ParityFailed(
            f"{where} does not compute what torch computes: " + "; ".join(complaints),
            hint="nothing was pushed; build again, and if it fails again report the operator to the exporter's project",
        )
    return Verified(
        artifact_sha256=artifact.sha256,
        key=artifact.key,
        runtime=output.runtime,
        runtime_version=output.runtime_version,
        samples=len(want[0]),
        max_relative_error=max(one.max_relative_error for one in agreements),
        min_cosine=min(one.min_cosine for one in agreements),
        top1_agreement=min((one.top1_agreement for one in agreements if one.top1_agreement is not None), default=None),
    )


def fit_limits(limits: ParityChoice, artifact: Artifact) -> ParityChoice:
    """The limits for an artifact, as `max_relative_error`, `min_cosine` and `min_top1_agreement`.

    A sum that falls on the other side of a half is one step of an activation, and layer by layer such steps grow to
    what rounding activations does at all: two that are independent of each other are √2 times as far apart as either is
    from the model. Half as much again is allowed; of 1 - cosine, half the square of an error, 1.5² times as much. Wrong
    weights are found in the file itself.
    """
    if artifact.key.precision == "float32":
        return limits
    noise = 0.0 if artifact.rounding_error is None else artifact.rounding_error
    cosine = 1.0 if artifact.rounding_cosine is None else artifact.rounding_cosine
    error = max(limits.max_rounded_error, min(_FLIPS * noise, _MOST_ERROR))
    least = min(limits.min_rounded_cosine, max(1 - _FLIPS**2 * (1 - cosine), _LEAST_COSINE))
    agreement = 1.0 if artifact.rounding_agreement is None else artifact.rounding_agreement
    chosen = min(limits.min_top1_agreement, max(1 - _FLIPS * (1 - agreement), _LEAST_AGREEMENT))
    return replace(limits, max_relative_error=error, min_cosine=least, min_top1_agreement=chosen)


def verify_proofs(
    artifact: Artifact, path: Path, proofs: Sequence[Proof], runner: Runner, limits: ParityChoice
) -> Verified:
    """Verify the artifact on all its proofs; the figures are the worst, the samples are those of all."""
    found = []
    for one in proofs:
        try:
            proven = artifact
            if artifact.generation is not None:
                proven = replace(artifact, generation=replace(artifact.generation, prompt_tokens=one.prompt_tokens))
            found.append(verify_artifact(proven, path, one.inputs, one.expected, runner, limits, one.rows))
        except ParityFailed as failure:
            if not one.lengths:
                raise
            hint = f"the file is wrong at this length: narrow the range in [export], or leave it out ({failure.hint})"
            raise ParityFailed(f"with {one.lengths}: {failure}", hint=hint) from failure
    return replace(
        found[0],
        samples=sum(one.samples for one in found),
        max_relative_error=max(one.max_relative_error for one in found),
        min_cosine=min(one.min_cosine for one in found),
        top1_agreement=min((one.top1_agreement for one in found if one.top1_agreement is not None), default=None),
    )


def refuse_changed(artifact: Artifact, path: Path) -> None:
    """Raise ParityFailed unless the file is byte for byte the one that was built."""
    where = f"{artifact.key.title} ({path.name})"
    if not path.is_file():
        raise ParityFailed(f"{where}: the file is gone", hint="build it again")
    size = path.stat().st_size
    if size != artifact.size_bytes or hash_file(path) != artifact.sha256:
        raise ParityFailed(
            f"{where} is not the file that was built: {size:,} bytes on disk, {artifact.size_bytes:,} built,"
            f" expected sha256 {artifact.sha256[:12]}…",
            hint=f"delete {path.parent} and build again",
        )


def compare_outputs(artifact: Artifact, got: Sequence[Array], want: Sequence[Array]) -> list[Agreement]:
    """Compare each output with torch's; ParityFailed if their number or shapes differ, or one is not finite."""
    where = artifact.key.title
    if [a.shape for a in got] != [b.shape for b in want]:
        raise ParityFailed(
            f"{where}: outputs of shape {[a.shape for a in got]}, torch gives {[b.shape for b in want]}",
            hint="build it again",
        )
    if not all(np.isfinite(a).all() for a in got):
        raise ParityFailed(f"{where}: the outputs hold NaN or infinity", hint="build it again")
    precision = artifact.key.precision
    return [_compare(spec, a, b, precision) for spec, a, b in zip(artifact.outputs, got, want, strict=True)]


def _compare(spec: TensorSpec, got: Array, want: Array, precision: Precision) -> Agreement:
    a, b = got.astype(np.float64), want.astype(np.float64)  # (samples, …)
    return Agreement(
        output=spec.name,
        max_relative_error=find_error(a, b),
        min_cosine=find_cosine(a, b),
        top1_agreement=None if spec.classes_axis is None else _compare_choices(a, b, spec.classes_axis, precision),
    )


def _compare_choices(a: NDArray[np.float64], b: NDArray[np.float64], axis: int, precision: Precision) -> float:
    """The share of answers with the same class; a tie in torch's scores is no difference.

    In float32 there are ties only among many answers a sample, some of which are always near.
    """
    single = a.ndim <= 2 and precision == "float32"  # noqa: PLR2004 - (samples, classes): one answer a sample
    return find_agreement(a, b, axis, 0.0 if single else _TIE if precision == "float32" else ROUNDED_TIE)


def _list_complaints(agreements: Sequence[Agreement], limits: ParityChoice) -> Iterator[str]:
    """Each limit that is not met, with both numbers, and the output's name if there are several."""
    for one in agreements:
        whose = f"{one.output}: " if len(agreements) > 1 else ""
        if not one.max_relative_error <= limits.max_relative_error:
            allowed = f"allowed {limits.max_relative_error:.2e}"
            yield f"{whose}relative max error {one.max_relative_error:.2e}, {allowed}"
        if not one.min_cosine >= limits.min_cosine:
            yield f"{whose}cosine {one.min_cosine:.6f}, at least {limits.min_cosine}"
        if one.top1_agreement is not None and not one.top1_agreement >= limits.min_top1_agreement:
            yield f"{whose}top-1 agreement {one.top1_agreement:.3f}, at least {limits.min_top1_agreement}"
