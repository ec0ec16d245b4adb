"""Tiny artifacts for timing: a site's layer as several copies, exported, proven and signed as all that is pushed."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rankship_pipeline.artifacts import find_proof, read_artifact, trace_graph
from rankship_pipeline.codec import digest, encode
from rankship_pipeline.errors import BuildError, ManifestRefused
from rankship_pipeline.evaluate import predict
from rankship_pipeline.export import EXPORTERS, keep_stdout_clean, load_exporter
from rankship_pipeline.export.graph import list_graph_operators
from rankship_pipeline.files import hash_file
from rankship_pipeline.layers import count_parameters
from rankship_pipeline.recipe import ParityChoice
from rankship_pipeline.records import Artifact, Factors, Format, TensorSpec, Verified
from rankship_pipeline.runner import Runner
from rankship_pipeline.sites import Site, make_copies, make_samples
from rankship_pipeline.store import Store
from rankship_pipeline.toolchain import RUNTIMES, find_version, hash_code, list_versions
from rankship_pipeline.verify import verify_artifact
from rankship_targets.manifest import read_manifest, sign_artifact

# A probe's output is no choice between classes: where two of its many values tie, top 1 says nothing.
LIMITS = ParityChoice(samples=2, min_top1_agreement=0.9)


def make_probe(site: Site, factors: Factors | None, copies: int, format_: Format, store: Store) -> Artifact:
    """Export a site's layer to one format, or read it from the store; its operators are read back from the file."""
    made_from: dict[str, object] = {
        "site": digest(site),
        "factors": str(factors),
        "copies": copies,
        "format": format_,
        "code": hash_code(),
        "versions": list_versions(format_),
    }
    name = f"model.{EXPORTERS[format_][1]}"

    def make(target: Path) -> None:
        module, samples = make_copies(site, factors, copies), make_samples(site, LIMITS.samples)
        graph = trace_graph(module, (samples[:1],))
        with keep_stdout_clean():
            exporter = load_exporter(format_)
            exporter.export_graph(graph, target / name)
            found = Counter((one.rows, one.columns) for one in exporter.list_operators(target / name))
        wanted = Counter((one.rows, one.columns) for one in list_graph_operators(graph))
        if wanted - found:
            hint = "the exporter joined what should stay apart; try another version of it"
            raise BuildError(
                f"{site} as {factors or 'dense'}: {wanted - found} are not in the {format_} file", hint=hint
            )
        outputs = predict(module, (samples,))
        np.save(target / "input.0.npy", samples.numpy())
        np.save(target / "expected.0.npy", outputs.numpy())
        artifact = Artifact(
            variant="dense" if factors is None else "compressed",
            format=format_,
            file=f"{store.name('probe', made_from)}/{name}",
            size_bytes=(target / name).stat().st_size,
            sha256=hash_file(target / name),
            inputs=(TensorSpec(name="input.0", shape=site.input_shape, dtype=str(samples.numpy().dtype)),),
            outputs=(TensorSpec(name="sum", shape=(1, *outputs.shape[1:]), dtype=str(outputs.numpy().dtype)),),
            parameters=count_parameters(module),
            factored_layers=(),
            recipe_sha256=digest(site),
            source_sha256={},
            toolchain=list_versions(format_),
        )
        (target / "artifact.json").write_text(encode(artifact), encoding="utf-8")

    return read_artifact(store.produce("probe", made_from, make))


def prove(
    artifact: Artifact, store: Store, runner: Runner, limits: ParityChoice
) -> tuple[Path, Sequence[Path], Verified]:
    """An artifact's file, its inputs, and the proof of its parity: this user's own of before, or made and signed."""
    path, inputs, expected = find_proof(artifact, store)
    try:
        known = read_manifest(path).verified
    except ManifestRefused:
        known = None
    here = {find_version(name) for name in RUNTIMES[artifact.format]}
    if known is None or known.runtime_version not in here:
        known = verify_artifact(artifact, path, inputs, expected, runner, limits)
        sign_artifact(path, known, artifact.recipe_sha256)
    return path, inputs, known
