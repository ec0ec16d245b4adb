"""One suite for every format: 8-bit files compute what their graph computes in torch, and no fault passes the gate."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from make.artifacts import describe_file
from make.eight_bits import FAULTS, ZERO_POINT, drop_zero_point, make_rounded, spoil, spoil_tflite
from rankship_pipeline.export.artifact import Part, export_file, read_operators
from rankship_pipeline.export.bits import check_stored
from rankship_pipeline.export.eight_bits import EightBits, list_weights
from rankship_pipeline.export.parity import verify_artifact
from rankship_pipeline.export.runner import FakeRunner
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.errors import BuildError, ParityFailed
from rankship_pipeline.foundation.formats import FACTS, FORMATS, Format
from rankship_pipeline.foundation.records import TensorSpec
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.agent.runtimes import find_runtime

pytestmark = pytest.mark.slow
Made = tuple[EightBits, ExportedProgram, torch.Tensor]


@pytest.fixture(scope="module")
def rounded() -> Made:
    return make_rounded()


@pytest.fixture(scope="module")
def other() -> ExportedProgram:
    return make_rounded(seed=1)[1]


@pytest.fixture(scope="module")
def tflite_files(rounded: Made, other: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of the net and of another one."""
    paths = [tmp_path_factory.mktemp("files") / name for name in ("right.tflite", "other.tflite")]
    for graph, path in zip((rounded[1], other), paths, strict=True):
        export_file(graph, "tflite", path)
    return paths


@pytest.fixture(params=FORMATS)
def format_(request: pytest.FixtureRequest) -> Format:
    return cast("Format", request.param)


def run(path: Path, format_: Format, *arrays: Any) -> Any:  # noqa: ANN401 - numpy's arrays
    """The output of a file in the format's own runtime, for one sample."""
    found = find_runtime(format_)
    assert found is not None
    loaded = found[2](None)(str(path), 1)
    return np.array(loaded.unpack(loaded.infer(loaded.prepare(list(arrays))))[0])


def compute(module: EightBits, x: torch.Tensor) -> Any:  # noqa: ANN401 - numpy's arrays
    with torch.inference_mode():
        given = module(x)
    assert isinstance(given, torch.Tensor)
    return given.numpy()


def prove(made: Made, path: Path, format_: Format) -> None:
    """Let a file through the parity gate, against the graph in torch."""
    module, _, x = made
    np.save(path.with_name("input.npy"), x.numpy())
    np.save(path.with_name("expected.npy"), compute(module, x))
    key = ArtifactKey(variant="compressed", format=format_, precision="int8")
    output = TensorSpec(name="output", shape=(1, 5), dtype="float32", classes_axis=-1)
    verify_artifact(
        describe_file(path, key, outputs=(output,)),
        path,
        [path.with_name("input.npy")],
        [path.with_name("expected.npy")],
        FakeRunner(partial(run, path, format_)),
        ParityChoice(),
    )


def test_files_compute_what_torch_computes_with_the_same_integers(
    format_: Format, rounded: Made, other: ExportedProgram, tmp_path: Path
) -> None:
    module, graph, x = rounded
    path = tmp_path / f"model.{FACTS[format_].suffix}"
    export_file(graph, format_, path)
    prove(rounded, path, format_)
    part = Part("compressed", module, (x,), precision="int8")
    check_stored(list_weights(graph), part, format_, path)
    with pytest.raises(BuildError, match="not stored as they were rounded"):
        check_stored(list_weights(other), part, format_, path)
    expected = compute(module, x)
    got = np.concatenate([run(path, format_, x[at : at + 1].numpy()) for at in range(len(x))])
    step = np.diff(np.unique(expected)).min()
    assert np.mean(np.abs(got - expected) < 0.01 * step) > 0.9  # the rest is rounded to a neighbour somewhere
    shapes = sorted((one.rows, one.columns) for one in read_operators(format_, path))
    assert shapes == [(5, 8), (5, 72), (8, 5), (8, 8), (8, 27)]
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("fault", [*FAULTS, ZERO_POINT])
def test_a_fault_does_not_pass(
    fault: str, format_: Format, rounded: Made, other: ExportedProgram, tflite_files: list[Path], tmp_path: Path
) -> None:
    graph, path = rounded[1], tmp_path / f"model.{FACTS[format_].suffix}"
    if format_ == "tflite":
        right, strange = tflite_files
        shutil.copy(right, path)
        spoil_tflite(path, strange, fault)
    else:
        export_file(drop_zero_point(graph) if fault == ZERO_POINT else spoil(graph, other, fault), format_, path)
    with pytest.raises(ParityFailed, match="does not compute what torch computes"):
        prove(rounded, path, format_)
