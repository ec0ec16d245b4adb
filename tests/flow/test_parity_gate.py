"""The gate in front of every device: each format passes when it is right, and each seeded fault is caught."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rankship_pipeline.export import keep_stdout_clean, load_exporter
from rankship_pipeline.export.artifact import find_proof
from rankship_pipeline.export.parity import verify_artifact
from rankship_pipeline.flow.budget import price_recipe
from rankship_pipeline.flow.build import build_recipe
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BuildError, ParityFailed
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.records import Artifact, Build, Verified
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.choices import choose
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_pipeline.recipe.rules import read_recipe
from rankship_targets.devices.device import describe_this_machine
from rankship_targets.session.runner import HostRunner
from rankship_targets.session.session import open_session

pytestmark = pytest.mark.slow
FACTORED = "3"  # the second convolution: in the tiny recipe it always becomes two operators


@pytest.fixture(scope="module")
def built(shared_recipe: Path, shared_store: Path) -> tuple[Build, Store, nn.Module]:
    """The build, and the compressed torch module that its files should compute."""
    prepared = prepare(read_recipe(shared_recipe), shared_recipe.parent)
    store = Store(shared_store)
    build, _ = build_recipe(prepared, store, Steps(quiet=True))
    stages = Stages(prepared, store, Steps(quiet=True))
    model, plan = stages.compress(price_recipe(prepared), choose(prepared.recipe))
    assert FACTORED in plan.factors
    return build, store, model.module


def _find(build: Build, name: Format) -> Artifact:
    return next(one for one in build.artifacts if one.key.format == name and one.key.variant == "compressed")


def _verify(artifact: Artifact, path: Path, store: Store) -> Verified:
    _, inputs, expected = find_proof(artifact, store)
    return verify_artifact(artifact, path, inputs, expected, HostRunner(), ParityChoice())


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_computes_what_torch_computes(built: tuple[Build, Store, nn.Module], name: Format) -> None:
    build, store, _ = built
    for artifact in (one for one in build.artifacts if one.key.format == name):
        proof = _verify(artifact, store.root / artifact.file, store)
        assert proof.max_relative_error < 1e-5
        assert proof.top1_agreement == 1
        assert proof.samples == 8


def _transpose_weight(model: nn.Module) -> None:
    weight = model.get_submodule(f"{FACTORED}.0").weight
    assert isinstance(weight, nn.Parameter)
    weight.data = weight.data.transpose(2, 3).contiguous()


def _drop_bias(model: nn.Module) -> None:
    bias = model.get_submodule(f"{FACTORED}.1").bias
    assert isinstance(bias, nn.Parameter)
    bias.data.zero_()


@pytest.mark.parametrize(("fault", "name"), [*((_transpose_weight, name) for name in FORMATS), (_drop_bias, "onnx")])
def test_a_wrong_exporter_is_caught_by_the_numbers(
    built: tuple[Build, Store, nn.Module], name: Format, fault: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    build, store, model = built
    artifact = _find(build, name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / Path(artifact.file).name
    try:
        fault(model)
        with keep_stdout_clean():
            load_exporter(name).export_graph(torch.export.export(model, (torch.zeros(1, 1, 8, 8),)), path)
    finally:
        model.load_state_dict(state)
    honest = _restamp(artifact, path)
    with pytest.raises(ParityFailed, match=rf"compressed {name} .*relative max error [0-9.e-]+, allowed"):
        _verify(honest, path, store)


def _restamp(artifact: Artifact, path: Path) -> Artifact:
    """The record that the wrong exporter would have written: its own file's hash, torch's right outputs."""
    return replace(artifact, sha256=hash_file(path), size_bytes=path.stat().st_size)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stale_file_is_caught_by_its_hash(
    built: tuple[Build, Store, nn.Module], name: Format, tmp_path: Path
) -> None:
    build, store, _ = built
    artifact = _find(build, name)
    dense = next(one for one in build.artifacts if one.key.format == name and one.key.variant == "dense")
    stale = tmp_path / Path(artifact.file).name
    shutil.copy(store.root / dense.file, stale)
    with pytest.raises(ParityFailed, match=f"compressed {name} .*is not the file that was built"):
        _verify(artifact, stale, store)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stale_file_with_a_stale_record_is_caught_by_the_numbers(
    built: tuple[Build, Store, nn.Module], name: Format
) -> None:
    build, store, _ = built
    dense = next(one for one in build.artifacts if one.key.format == name and one.key.variant == "dense")
    path = store.root / dense.file
    with pytest.raises(ParityFailed, match="relative max error"):
        _verify(_restamp(_find(build, name), path), path, store)


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_is_caught_by_its_size_and_by_its_runtime(
    built: tuple[Build, Store, nn.Module], name: Format, tmp_path: Path
) -> None:
    build, store, _ = built
    artifact = _find(build, name)
    path = tmp_path / Path(artifact.file).name
    content = (store.root / artifact.file).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ParityFailed, match=f"compressed {name} .*{len(content) // 2:,} bytes on disk"):
        _verify(artifact, path, store)
    with pytest.raises(ParityFailed, match=f"compressed {name} .*does not run"):
        _verify(_restamp(artifact, path), path, store)


def test_nothing_unverified_is_pushed(built: tuple[Build, Store, nn.Module], tmp_path: Path) -> None:
    build, store, _ = built
    artifact = _find(build, "onnx")
    proof = _verify(artifact, store.root / artifact.file, store)
    tampered = tmp_path / "model.onnx"
    tampered.write_bytes((store.root / artifact.file).read_bytes() + b"x")
    with open_session(describe_this_machine()) as session, pytest.raises(BuildError, match="nothing was pushed"):
        session.push(tampered, proof)
