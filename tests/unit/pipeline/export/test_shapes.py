"""Lengths that may vary: from the recipe's axes to a file that is proven at both ends and between."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankship_pipeline.export.artifact import (
    Part,
    export_file,
    find_output_axes,
    find_proofs,
    fix_shapes,
    read_artifact,
    write_artifact,
)
from rankship_pipeline.export.graph import trace_ranges
from rankship_pipeline.export.parity import verify_proofs
from rankship_pipeline.export.runner import FakeRunner
from rankship_pipeline.export.shapes import find_axes, list_fixed_points, list_points
from rankship_pipeline.foundation.errors import InputError, ParityFailed, UnsupportedOp
from rankship_pipeline.foundation.records import Artifact, Dimension
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import AxisChoice, ExportChoice, ParityChoice
from rankship_targets.session.runner import HostRunner

WORDS, TOKENS, WIDTH = 11, 6, 8
BATCH = Dimension(name="batch", low=1, high=5, example=1)
SEQUENCE = Dimension(name="sequence", low=1, high=12, example=TOKENS)
BOTH = ExportChoice(batch=(1, 5), axes=(AxisChoice(name="sequence", axis=1, range=(1, 12)),))


class Reader(nn.Module):
    """Class scores (samples, 3) and a number for every token, of token ids and their mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(12, WIDTH)
        self.mix, self.classes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.mix(self.table(ids) + self.places(torch.arange(ids.shape[1]))) * mask[..., None]
        return {"scores": self.classes(x.sum(1) / mask.sum(1, keepdim=True)), "tokens": x.sum(-1)}


class OfTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] == 2 else x


class OfSix(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(TOKENS, TOKENS).tril())

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2) * self.mask).sum(1)


@pytest.fixture
def samples() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    return torch.randint(WORDS, (7, TOKENS), generator=random), torch.ones(7, TOKENS)


def keep(store: Store, part: Part) -> Artifact:
    graph = trace_ranges(part.module, part.samples, part.axes)
    made_from = {"part": part.title}

    def make(target: Path) -> None:
        write_artifact(
            target,
            store.name("artifact", made_from),
            part,
            "onnx",
            lambda path: export_file(graph, "onnx", path, part.axes),
            recipe_sha256="r",
            source_sha256={},
        )

    return read_artifact(store.produce("artifact", made_from, make))


def test_an_axis_is_found_in_every_input_that_has_it(samples: tuple[Tensor, ...]) -> None:
    assert find_axes(BOTH, Reader(), samples) == ({0: BATCH, 1: SEQUENCE},) * 2
    assert find_axes(ExportChoice(), Reader(), samples) == ()
    alone = ExportChoice(axes=(AxisChoice(name="sequence", axis=1, range=(1, 12), inputs=("mask",)),))
    assert find_axes(alone, Reader(), samples) == ({}, {1: SEQUENCE})


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (AxisChoice(name="s", axis=1, range=(1, 12), inputs=("pixels",)), r"no input pixels"),
        (AxisChoice(name="s", axis=2, range=(1, 12)), r"no input has axis 2"),
        (AxisChoice(name="s", axis=1, range=(8, 12)), r"the data have length 6 there, outside \[8, 12\]"),
    ],
)
def test_an_axis_that_does_not_fit_the_data_is_refused(
    samples: tuple[Tensor, ...], axis: AxisChoice, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        find_axes(ExportChoice(axes=(axis,)), Reader(), samples)


def test_inputs_that_differ_along_a_shared_axis_and_an_axis_of_two_names_are_refused(
    samples: tuple[Tensor, ...],
) -> None:
    with pytest.raises(InputError, match="the inputs differ along it: 4 in axis 1 of 'mask', 6 elsewhere"):
        find_axes(BOTH, Reader(), (samples[0], samples[1][:, :4]))
    twice = (*BOTH.axes, AxisChoice(name="tokens", axis=1, range=(1, 12)))
    with pytest.raises(InputError, match="axis 1 of 'ids' has two names, 'sequence' and 'tokens'"):
        find_axes(ExportChoice(axes=twice), Reader(), samples)


def test_points_are_both_ends_and_between() -> None:
    assert list_points([BATCH, SEQUENCE]) == [
        {"batch": 1, "sequence": 1},
        {"batch": 5, "sequence": 12},
        {"batch": 2, "sequence": 8},
    ]
    assert list_points([BATCH]) == [{"batch": 5}, {"batch": 3}]  # the example has proven 1
    assert list_points([]) == []
    assert [point["batch"] for point in list_fixed_points([Dimension(name="batch", low=1, high=3, example=1)])] == [
        1,
        2,
        3,
    ]
    assert list_fixed_points([BATCH, SEQUENCE]) == [
        {"batch": 1, "sequence": 6},
        *({"batch": batch, "sequence": sequence} for batch in (1, 5) for sequence in (1, 12)),
    ]


def test_a_file_of_ranges_names_its_axes_and_is_proven_at_both_ends_and_between(
    samples: tuple[Tensor, ...], tmp_path: Path
) -> None:
    module, store = Reader().eval(), Store(tmp_path)
    artifact = keep(store, Part("dense", module, samples, axes=find_axes(BOTH, module, samples)))
    assert [one.shape for one in artifact.inputs] == [(BATCH, SEQUENCE)] * 2
    assert [one.shape for one in artifact.outputs] == [(BATCH, 3), (BATCH, SEQUENCE)]
    graph = onnx.load(store.root / artifact.file).graph
    named = [[side.dim_param for side in one.type.tensor_type.shape.dim] for one in (*graph.input, *graph.output)]
    assert named == [["batch", "sequence"]] * 2 + [["batch", ""], ["batch", "sequence"]]
    path, proofs = find_proofs(artifact, store)
    assert [(one.rows, one.lengths) for one in proofs] == [
        (1, ""),
        (1, "batch 1, sequence 1"),
        (5, "batch 5, sequence 12"),
        (2, "batch 2, sequence 8"),
    ]
    assert [np.load(one.inputs[0]).shape for one in proofs] == [(7, 6), (8, 1), (5, 12), (8, 8)]
    proof = verify_proofs(artifact, path, proofs, HostRunner(), ParityChoice())
    assert proof.samples == 28
    assert proof.max_relative_error < 1e-5


def test_a_file_that_is_wrong_at_one_end_alone_is_caught_and_the_length_named(
    samples: tuple[Tensor, ...], tmp_path: Path
) -> None:
    module, store = Reader().eval(), Store(tmp_path)
    artifact = keep(store, Part("dense", module, samples, axes=find_axes(BOTH, module, samples)))
    path, proofs = find_proofs(artifact, store)

    def run(wrong: Callable[[tuple[int, ...]], bool]) -> None:
        def compute(*arrays: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
            with torch.inference_mode():
                scores, tokens = (one.numpy() for one in module(*map(torch.from_numpy, arrays)).values())
            return (-scores if wrong(arrays[0].shape) else scores), tokens

        verify_proofs(artifact, path, proofs, FakeRunner(compute), ParityChoice())

    run(lambda _: False)
    with pytest.raises(ParityFailed, match=r"with batch 5, sequence 12: .*scores: relative max error"):
        run(lambda shape: shape == (5, 12))
    with pytest.raises(ParityFailed, match="with batch 1, sequence 1: "):
        run(lambda shape: shape[1] == 1)


def test_a_format_of_fixed_shapes_gets_a_part_for_each_with_samples_of_that_shape(
    samples: tuple[Tensor, ...],
) -> None:
    module = Reader().eval()
    parts = fix_shapes(Part("dense", module, samples, axes=find_axes(BOTH, module, samples)))
    assert [(one.shape, one.rows, tuple(one.samples[0].shape)) for one in parts] == [
        ("", 1, (7, 6)),
        ("batch 1, sequence 1", 1, (7, 1)),
        ("batch 1, sequence 12", 1, (7, 12)),
        ("batch 5, sequence 1", 5, (5, 1)),
        ("batch 5, sequence 12", 5, (5, 12)),
    ]
    assert parts[-1].name_artifact("tflite").title == "dense tflite, batch 5, sequence 12"
    plain = Part("dense", module, samples)
    assert fix_shapes(plain) == [plain]


def test_the_lengths_of_outputs_are_the_inputs_or_their_own() -> None:
    pool = nn.AvgPool1d(2)
    axes = ({0: BATCH, 2: Dimension(name="time", low=4, high=16, example=8)},)
    (found,) = find_output_axes(Part("dense", pool, (torch.randn(3, 2, 8),), axes=axes))
    assert found == {0: BATCH, 2: Dimension(name="output.2", low=2, high=8, example=4)}


def test_two_lengths_of_one_range_stay_two() -> None:
    sides = {
        2: Dimension(name="height", low=4, high=16, example=8),
        3: Dimension(name="width", low=4, high=16, example=8),
    }
    points = list_points(list(sides.values()))
    assert any(point["height"] != point["width"] for point in points)
    (found,) = find_output_axes(Part("dense", nn.Conv2d(2, 3, 1), (torch.randn(3, 2, 8, 8),), axes=(sides,)))
    assert found == sides


@pytest.mark.parametrize(
    ("module", "fixed", "line"),
    [
        (OfTwo(), "batch 1 to 5: the model's code takes only batch = 2", "return x \\+ 1 if x.shape"),
        (OfSix(), "sequence 1 to 12: the model's code takes only sequence = 6", "x @ x.transpose"),
    ],
)
def test_a_length_that_the_code_fixes_is_named_with_its_line(module: nn.Module, fixed: str, line: str) -> None:
    axes = ({0: BATCH, 1: SEQUENCE},)
    with pytest.raises(UnsupportedOp, match=fixed + r", which it decides at test_shapes.py:\d+ \(.*" + line):
        trace_ranges(module, (torch.randn(3, TOKENS, WIDTH),), axes)
