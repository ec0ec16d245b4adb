"""Several named outputs, and sides of any length, from the exported file to the gate."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankship_pipeline.export.artifact import (
    Part,
    export_file,
    find_proof,
    read_artifact,
    read_operators,
    write_artifact,
)
from rankship_pipeline.export.graph import trace_graph
from rankship_pipeline.export.parity import verify_artifact
from rankship_pipeline.export.runner import FakeRunner
from rankship_pipeline.foundation.errors import BuildError, ParityFailed
from rankship_pipeline.foundation.records import Artifact, Dimension, TensorSpec
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.session.runner import HostRunner

SAMPLES, SIDE = 5, 4
LENGTH = Dimension(name="length", low=2, high=8)


class Detector(nn.Module):
    """Scores (samples, 3) and one number for each sample."""

    def __init__(self, *, as_tuple: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classes, self.size = nn.Linear(SIDE, 3), nn.Linear(SIDE, 1)
        self.as_tuple = as_tuple

    def forward(self, x: Tensor) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        scores, sizes = self.classes(x), self.size(x).exp().flatten()
        return (scores, sizes) if self.as_tuple else {"scores": scores, "sizes": sizes}


def keep(store: Store, part: Part) -> Artifact:
    graph = trace_graph(part.module, tuple(tensor[:1] for tensor in part.samples))
    made_from = {"part": part.title, "outputs": list(part.outputs), "as_tuple": getattr(part.module, "as_tuple", None)}

    def make(target: Path) -> None:
        name = store.name("artifact", made_from)
        write_artifact(
            target,
            name,
            part,
            "onnx",
            lambda path: export_file(graph, "onnx", path),
            recipe_sha256="r",
            source_sha256={},
        )

    return read_artifact(store.produce("artifact", made_from, make))


@pytest.fixture
def samples() -> tuple[Tensor, ...]:
    return (torch.randn(SAMPLES, SIDE, generator=torch.Generator().manual_seed(1)),)


Outputs = tuple[NDArray[np.float32], ...]


def compute(module: nn.Module) -> Callable[[NDArray[np.float32]], Outputs]:
    def run(x: NDArray[np.float32]) -> Outputs:
        with torch.inference_mode():
            return tuple(one.numpy() for one in module(torch.from_numpy(x)).values())

    return run


@pytest.mark.parametrize(
    "part_of",
    [
        lambda samples: Part(
            "dense", Detector(), samples, classes={"scores": -1}
        ),  # a dictionary names its outputs itself
        lambda samples: Part(
            "dense", Detector(as_tuple=True), samples, outputs=("scores", "sizes"), classes={"scores": -1}
        ),
    ],
)
def test_every_output_is_named_described_kept_and_proven_by_its_runtime(
    part_of: Callable[[tuple[Tensor, ...]], Part], samples: tuple[Tensor, ...], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    artifact = keep(store, part_of(samples))
    assert [(one.name, one.shape) for one in artifact.outputs] == [("scores", (1, 3)), ("sizes", (1,))]
    assert len(read_operators("onnx", store.root / artifact.file)) == 2
    path, inputs, expected = find_proof(artifact, store)
    assert [file.name for file in expected] == ["expected.0.npy", "expected.1.npy"]
    np.testing.assert_allclose(np.load(expected[1]), Detector()(*samples)["sizes"].detach().numpy(), rtol=1e-5)
    proof = verify_artifact(artifact, path, inputs, expected, HostRunner(), ParityChoice())
    assert (proof.key, proof.samples, proof.top1_agreement) == (artifact.key, SAMPLES, 1.0)


def test_an_output_that_alone_is_wrong_is_caught_and_named(samples: tuple[Tensor, ...], tmp_path: Path) -> None:
    store, module = Store(tmp_path), Detector()
    artifact = keep(store, Part("dense", module, samples))
    right = compute(module)

    def run(runner: FakeRunner) -> float:
        path, inputs, expected = find_proof(artifact, store)
        return verify_artifact(artifact, path, inputs, expected, runner, ParityChoice()).max_relative_error

    assert run(FakeRunner(right)) < 1e-6
    for wrong, name in (
        (lambda x: (right(x)[0], 1.1 * right(x)[1]), "sizes"),
        (lambda x: (-right(x)[0], right(x)[1]), "scores"),
    ):
        with pytest.raises(ParityFailed, match=f"{name}: relative max error") as caught:
            run(FakeRunner(wrong))
        assert ("sizes: " in str(caught.value)) != ("scores: " in str(caught.value))
    with pytest.raises(ParityFailed, match="outputs of shape"):
        run(FakeRunner(lambda x: right(x)[0]))
    with pytest.raises(ParityFailed, match="outputs of shape"):
        run(FakeRunner(lambda x: right(x)[::-1]))


def test_outputs_that_are_not_named_one_by_one_are_refused(samples: tuple[Tensor, ...], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="returns 2 outputs, the names are output"):
        keep(Store(tmp_path), Part("dense", Detector(as_tuple=True), samples))


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((1, 2), True), ((1, 8), True), ((1, 1), False), ((1, 9), False), ((2, 4), False), ((1,), False)],
)
def test_a_shape_fits_within_its_ranges(shape: tuple[int, ...], fits: bool) -> None:  # noqa: FBT001 - a case's answer
    assert TensorSpec(name="x", shape=(1, LENGTH), dtype="float32").fits(shape) == fits
