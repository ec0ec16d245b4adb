"""Artifacts and the proofs of their parity."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.records import Artifact, Verified
from rankship_targets.session.manifest import sign_artifact
from rankship_targets.trials.request import MeasureRequest

DENSE = ArtifactKey(variant="dense", format="onnx")
COMPRESSED = ArtifactKey(variant="compressed", format="onnx")
CANARY = ArtifactKey(variant="canary", format="onnx")
RUNTIMES: dict[Format, tuple[str, str]] = {
    "onnx": ("onnxruntime", "1.31.0"),
    "tflite": ("ai-edge-litert", "2.3.0"),
    "executorch": ("executorch", "1.5.1"),
}
NO_RECIPE = "0" * 64  # the recipe of what no recipe made


def make_artifact(key: ArtifactKey = DENSE, **changes: Any) -> Artifact:  # noqa: ANN401 - any field
    """An artifact of one parameter in a file that does not exist."""
    artifact = Artifact(
        key=key,
        file="m",
        size_bytes=1,
        sha256=key.title,
        inputs=(),
        outputs=(),
        parameters=1,
        factored_layers=(),
        recipe_sha256="r",
        source_sha256={},
        toolchain={},
    )
    return replace(artifact, **changes)


def describe_file(path: Path, key: ArtifactKey = DENSE, **changes: Any) -> Artifact:  # noqa: ANN401 - any field
    """The artifact that a file is, named as beside it."""
    return make_artifact(
        key, **{"file": path.name, "size_bytes": path.stat().st_size, "sha256": hash_file(path), **changes}
    )


def make_proof(sha256: str, key: ArtifactKey = DENSE, **changes: Any) -> Verified:  # noqa: ANN401 - any field
    """A proof without any error, not signed."""
    name, version = RUNTIMES[key.format]
    proof = Verified(
        artifact_sha256=sha256,
        key=key,
        runtime=name,
        runtime_version=version,
        samples=1,
        max_relative_error=0.0,
        min_cosine=1.0,
        top1_agreement=1.0,
    )
    return replace(proof, **changes)


def sign(path: Path, key: ArtifactKey = DENSE, **changes: Any) -> Verified:  # noqa: ANN401 - any field
    """Sign a file as the parity gate does what it has proven."""
    proof = make_proof(hash_file(path), key, **changes)
    sign_artifact(path, proof, NO_RECIPE)
    return proof


def make_request(
    artifact: str,
    sha256: str,
    inputs: Sequence[str] = (),
    key: ArtifactKey = DENSE,
    **changes: Any,  # noqa: ANN401 - any field
) -> MeasureRequest:
    """A request for the shortest trial of one thread; `artifact` and `inputs` are paths on the device."""
    request = MeasureRequest(
        round=0,
        key=key,
        artifact=artifact,
        artifact_sha256=sha256,
        inputs=tuple(inputs),
        threads=1,
        min_samples=20,
        min_duration_ms=1,
        max_warmup_ms=2000,
    )
    return replace(request, **changes)
