"""Artifacts and the proofs of their parity."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import Artifact, Format, Variant, Verified
from rankship_targets.session.manifest import sign_artifact
from rankship_targets.trials.request import MeasureRequest

Case = tuple[Variant, Format]
DENSE: Case = ("dense", "onnx")
COMPRESSED: Case = ("compressed", "onnx")
CANARY: Case = ("canary", "onnx")
RUNTIMES: dict[Format, tuple[str, str]] = {
    "onnx": ("onnxruntime", "1.31.0"),
    "tflite": ("ai-edge-litert", "2.3.0"),
    "executorch": ("executorch", "1.5.1"),
}
NO_RECIPE = "0" * 64  # the recipe of what no recipe made


def make_artifact(case: Case = DENSE, **changes: Any) -> Artifact:  # noqa: ANN401 - any field
    """An artifact of one parameter in a file that does not exist."""
    variant, format_ = case
    artifact = Artifact(
        variant=variant,
        format=format_,
        file="m",
        size_bytes=1,
        sha256=f"{variant} {format_}",
        inputs=(),
        outputs=(),
        parameters=1,
        factored_layers=(),
        recipe_sha256="r",
        source_sha256={},
        toolchain={},
    )
    return replace(artifact, **changes)


def describe_file(path: Path, case: Case = DENSE, **changes: Any) -> Artifact:  # noqa: ANN401 - any field
    """The artifact that a file is, named as beside it."""
    return make_artifact(
        case, **{"file": path.name, "size_bytes": path.stat().st_size, "sha256": hash_file(path), **changes}
    )


def make_proof(sha256: str, case: Case = DENSE, **changes: Any) -> Verified:  # noqa: ANN401 - any field
    """A proof without any error, not signed."""
    variant, format_ = case
    name, version = RUNTIMES[format_]
    proof = Verified(
        artifact_sha256=sha256,
        variant=variant,
        format=format_,
        runtime=name,
        runtime_version=version,
        samples=1,
        max_relative_error=0.0,
        min_cosine=1.0,
        top1_agreement=1.0,
    )
    return replace(proof, **changes)


def sign(path: Path, case: Case = DENSE, **changes: Any) -> Verified:  # noqa: ANN401 - any field
    """Sign a file as the parity gate does what it has proven."""
    proof = make_proof(hash_file(path), case, **changes)
    sign_artifact(path, proof, NO_RECIPE)
    return proof


def make_request(
    artifact: str,
    sha256: str,
    inputs: Sequence[str] = (),
    case: Case = DENSE,
    **changes: Any,  # noqa: ANN401 - any field
) -> MeasureRequest:
    """A request for the shortest trial of one thread; `artifact` and `inputs` are paths on the device."""
    variant, format_ = case
    request = MeasureRequest(
        round=0,
        variant=variant,
        format=format_,
        artifact=artifact,
        artifact_sha256=sha256,
        inputs=tuple(inputs),
        threads=1,
        min_samples=20,
        min_duration_ms=1,
        max_warmup_ms=2000,
    )
    return replace(request, **changes)
