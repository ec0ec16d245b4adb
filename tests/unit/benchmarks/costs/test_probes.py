"""Probes: small files for timing, cut from one export, in every type, each proven as artifacts are."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rankship_benchmarks.costs.probes import LIMITS, Probe, make_probes, prove
from rankship_pipeline.export import onnx_read
from rankship_pipeline.export.executorch_bits import read_weights
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import ParityFailed
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.records import Factors, RunOutput, Stored
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.ranks.call_sites import Site
from rankship_pipeline.recipe.precision import Computed
from rankship_targets.session.runner import HostRunner

SITE = Site(
    kind="convolution", rows=16, columns=72, bias=False, input_shape=(1, 8, 8, 8), kernel=(3, 3), padding=(1, 1)
)


def test_probes_are_cut_from_one_export_and_each_is_proven(tmp_path: Path) -> None:
    store = Store(tmp_path)
    spatial = Factors(form="spatial", rank=4)
    ways = (Stored(), Stored(factors=Factors(rank=2)), Stored(factors=spatial))
    probes = [Probe(SITE, Stored(), 1), *(Probe(SITE, way, 3) for way in ways)]
    artifacts = make_probes(probes, "onnx", store)
    assert [one.parameters for one in artifacts] == [16 * 72, 3 * 16 * 72, 3 * 2 * 88, 3 * 4 * (24 + 48)]
    assert make_probes(probes[2:3], "onnx", store) == artifacts[2:3]
    path, _, proof = prove(artifacts[3], store, HostRunner(), LIMITS)
    assert proof.max_relative_error < 1e-5
    assert prove(artifacts[3], store, _Unused(), LIMITS)[2] == proof  # signed before
    path.write_bytes((store.root / artifacts[2].file).read_bytes())
    with pytest.raises(ParityFailed, match="not the file that was built"):
        prove(artifacts[3], store, HostRunner(), LIMITS)


@pytest.mark.parametrize(("computed", "weights"), [("static", "int8"), ("dynamic", "int4")])
def test_probes_of_fewer_bits_hold_integers_and_are_proven(
    tmp_path: Path, computed: Computed, weights: Precision
) -> None:
    linear = Site(kind="linear", rows=32, columns=64, bias=True, input_shape=(1, 4, 64))
    site = SITE if computed == "static" else linear
    ways = [Stored(), Stored(weights=weights), Stored(factors=Factors(rank=32), weights=weights)]
    plain, dense, factored = make_probes([Probe(site, way, 3, computed) for way in ways], "onnx", Store(tmp_path))
    assert [one.key.precision for one in (plain, dense, factored)] == ["float32", weights, weights]
    assert dense.size_bytes < 0.6 * plain.size_bytes
    stored = [one for one in onnx_read.read_weights(tmp_path / factored.file) if one.precision == weights]
    assert len(stored) == 3 * 2, "both factors of every copy"
    assert len({one.integers.tobytes() for one in stored}) == 3 * 2, "copies share no weights"
    for one in (dense, factored):
        assert prove(one, Store(tmp_path), HostRunner(), LIMITS)[2].max_relative_error < 0.02


def test_rounded_embeddings_at_the_same_places_are_read_one_by_one(tmp_path: Path) -> None:
    """ExecuTorch looks integers and scales up by themselves: copies differ in nothing but their numbers."""
    site = Site(kind="embedding", rows=8, columns=12, bias=False, input_shape=(1, 5))
    (probe,) = make_probes([Probe(site, Stored(weights="int8"), 2, "dynamic")], "executorch", Store(tmp_path))
    tables = [one.integers.tobytes() for one in read_weights(tmp_path / probe.file)]
    assert len(set(tables)) == 2


class _Unused:
    def run(
        self,
        format: Format,  # noqa: A002
        artifact: Path,
        inputs: Sequence[Path],
        into: Path,
        rows: int = 1,
        generation: Generation | None = None,
    ) -> RunOutput:
        pytest.fail(f"a signed proof of {artifact} was made again: {format}, {inputs}, {into}, {rows}, {generation}")
