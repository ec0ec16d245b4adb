"""Probes: small artifacts for timing, with copies of a site's layer; exported, verified and signed like any other."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from rankship_pipeline.export import keep_stdout_clean, load_exporter
from rankship_pipeline.export.artifact import (
    Part,
    export_file,
    find_proof,
    read_artifact,
    read_operators,
    write_artifact,
)
from rankship_pipeline.export.bits import fit_format, store_bits
from rankship_pipeline.export.graph import expect_operators, trace_graph
from rankship_pipeline.export.parity import verify_artifact
from rankship_pipeline.export.runner import Runner
from rankship_pipeline.flow.rounded import round_copies
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import BuildError, ManifestRefused
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.records import Artifact, Stored, Verified
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import find_version, hash_code, list_versions
from rankship_pipeline.ranks.call_sites import Branches, Site, make_copies, make_samples
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_pipeline.recipe.precision import Computed
from rankship_targets.session.manifest import read_manifest, sign_artifact

# A probe's output is no class scores: two of its many values may tie, so top 1 may differ without an error.
LIMITS = ParityChoice(samples=2, min_top1_agreement=0.9)


@dataclass(frozen=True)
class Probe:
    """A site's layer stored in one way, as `copies` copies side by side, with activations computed as `computed`."""

    site: Site
    stored: Stored
    copies: int
    computed: Computed = "float32"

    @property
    def reads_fewer(self) -> "Probe":
        """The same layer as one that is dense, on inputs of fewer neurons; itself if it reads all of them."""
        factors = self.stored.factors
        if factors is None or factors.form != "width" or factors.input_rank is None:
            return self
        shape = (*self.site.input_shape[:-1], factors.input_rank)
        site = replace(self.site, rows=factors.rank, columns=factors.input_rank, input_shape=shape)
        return replace(self, site=site, stored=Stored(weights=self.stored.weights))

    def list_ingredients(self, format_: Format) -> dict[str, object]:
        """Return everything that the probe's file depends on."""
        bits = self.stored.weights != "float32"
        return {
            "site": digest(self.site),
            "stored": str(self.stored),
            "computed": self.computed if bits else "float32",
            "copies": self.copies,
            "format": format_,
            "code": hash_code(),
            "versions": [list_versions(format_), list_versions("executorch") if bits else {}],  # its quantiser's
        }

    def make_part(self, module: nn.Module) -> Part:
        """Make the part with the proof's inputs."""
        samples = (make_samples(self.site, LIMITS.samples),)
        return Part("dense" if self.stored.factors is None else "compressed", module, samples, outputs=("sum",))


def make_probes(probes: Sequence[Probe], format_: Format, store: Store) -> list[Artifact]:
    """Export probes of one site, or read them from the store; returns their records in the same order.

    ONNX files are exported as one graph, which takes little longer than a single file, and then split; those that read
    fewer neurons one by one.
    """
    made: dict[Probe, Artifact] = {}
    wanted = {one: one.reads_fewer for one in probes}
    for site in dict.fromkeys(one.site for one in wanted.values()):
        some = [one for one in wanted if wanted[one].site == site]
        made |= zip(some, _make_alike([wanted[one] for one in some], format_, store), strict=True)
    return [made[one] for one in probes]


def _make_alike(probes: Sequence[Probe], format_: Format, store: Store) -> list[Artifact]:
    """Export probes that read the same inputs."""
    missing = [one for one in probes if store.find("probe", one.list_ingredients(format_)) is None]
    parts = _make_parts(missing, format_)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{place}.{FACTS[format_].suffix}" for place in range(len(missing))]
        if missing and format_ == "onnx":
            _export_together([one.module for one in parts], make_samples(missing[0].site, 1), files)
        for probe, part, file in zip(missing, parts, files, strict=True):
            _keep(probe, part, file, format_, store)
    entries = [store.find("probe", one.list_ingredients(format_)) for one in probes]
    return [read_artifact(entry) for entry in entries if entry is not None]


def _make_parts(probes: Sequence[Probe], format_: Format) -> list[Part]:
    """Make the parts of one site's probes, with random weights, as a format exports them."""
    copies = {one: make_copies(one.site, one.stored.factors, one.copies) for one in probes}
    parts = {one: one.make_part(module) for one, module in copies.items() if one.stored.weights == "float32"}
    others = [one for one in probes if one not in parts]
    if others:
        samples = (make_samples(others[0].site, LIMITS.samples),)
        rounded = round_copies([(copies[one], one.stored.weights) for one in others], others[0].computed, samples)
        for one, (module, bits) in zip(others, rounded, strict=True):
            parts[one] = fit_format(bits.give(one.make_part(module)), format_)
    return [parts[one] for one in probes]


def _export_together(modules: Sequence[nn.Module], sample: Tensor, files: Sequence[Path]) -> None:
    from rankship_pipeline.export.onnx import split_outputs

    whole = files[0].with_name("whole.onnx")
    with keep_stdout_clean():
        load_exporter("onnx").export_graph(trace_graph(Branches(modules), (sample,)), whole)
        split_outputs(whole, files)


def _keep(probe: Probe, part: Part, file: Path, format_: Format, store: Store) -> None:
    """Put a probe into the store with inputs and torch's outputs; BuildError if its file lacks an operator."""
    made_from = probe.list_ingredients(format_)

    def write(path: Path) -> None:
        graph = trace_graph(part.module, tuple(one[:1] for one in part.samples))
        if file.exists():
            shutil.copyfile(file, path)
        else:
            export_file(graph, format_, path)
        store_bits(part, graph, format_, path)  # what a converter keeps in float32, it keeps so in the model too
        found = Counter((one.rows, one.columns) for one in read_operators(format_, path))
        wanted = Counter((one.rows, one.columns) for one in expect_operators(graph).needed)
        if wanted - found:
            message = f"{probe.site} as {probe.stored}: {wanted - found} are not in the {format_} file"
            raise BuildError(
                message, hint="the exporter merged operators that should stay apart; try another version of it"
            )

    make = partial(
        write_artifact,
        entry=store.name("probe", made_from),
        part=part,
        format_=format_,
        write_file=write,
        recipe_sha256=digest(probe.site),
        source_sha256={},
    )
    store.produce("probe", made_from, make)


def prove(
    artifact: Artifact, store: Store, runner: Runner, limits: ParityChoice
) -> tuple[Path, Sequence[Path], Verified]:
    """Return an artifact's file, its inputs, and its parity proof: this user's earlier one, or a new, signed one."""
    path, inputs, expected = find_proof(artifact, store)
    try:
        known = read_manifest(path).verified
    except ManifestRefused:
        known = None
    here = find_version(FACTS[artifact.key.format].runtime_distribution)
    if known is None or known.runtime_version != here:
        known = verify_artifact(artifact, path, inputs, expected, runner, limits)
        sign_artifact(path, known, artifact.recipe_sha256)
    return path, inputs, known
