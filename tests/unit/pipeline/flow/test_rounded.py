"""Builds whose compressed models have weights of fewer bits."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from rankship_benchmarks.measure.host_gate import verify_on_host
from rankship_pipeline.export.onnx_read import read_weights
from rankship_pipeline.flow.build import build_recipe
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.show import describe_smaller
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BudgetInfeasible, InputError
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.records import Build
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.data import Held, make_data
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import DataChoice, MergeChoice, Recipe, RefineChoice, Source
from rankship_pipeline.recipe.export_choices import ExportChoice, ParityChoice
from rankship_pipeline.recipe.precision import Activations, PrecisionChoice
from rankship_pipeline.recipe.rules import check_recipe


class Net(nn.Module):
    """A convolution, and two linear layers of which one is wide enough to be factored."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.wide, self.head = nn.Conv2d(1, 8, 3, 2, 1), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.wide(torch.relu(self.first(x)).flatten(1)))
        return torch.as_tensor(self.head(y))


def build(
    folder: Path,
    budget: Budget,
    *weights: Precision,
    net: nn.Module | None = None,
    x: Tensor | None = None,
    activations: Activations = "static",
    formats: tuple[Format, ...] = (),
    refine: RefineChoice | None = None,
) -> tuple[Build, Store]:
    """Build an ONNX file of each kind, from a net of 9,234 parameters unless another is given."""
    recipe = Recipe(
        name="net",
        models=(Source(name="a", held=True),),
        data=DataChoice(held=True),
        budget=budget,
        precision=PrecisionChoice(weights=weights, activations=activations, formats=formats),
        export=ExportChoice(formats=("onnx",)),
        refine=refine,
    )
    check_recipe(recipe, "here")
    x = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1)) if x is None else x
    data = make_data({"calibration": {"a": x}, "test_inputs": x, "test_labels": None}, recipe, "here")
    steps, store = Steps(quiet=True), Store(folder)
    prepared = prepare(recipe, Path(), Held({"a": net or Net().eval()}, data))
    return build_recipe(prepared, store, steps)[0], store


def test_each_type_has_files_of_its_own_where_the_budget_counts_parameters(tmp_path: Path) -> None:
    made, store = build(tmp_path, Budget(kept_parameters=0.6), "float32", "int8")
    titles = [one.key.title for one in made.artifacts]
    assert titles == ["dense onnx", "compressed onnx", "compressed onnx, int8"]
    _, whole, rounded = made.artifacts
    assert whole.factored_layers == rounded.factored_layers
    assert "wide" in rounded.factored_layers
    assert rounded.size_bytes < 0.6 * whole.size_bytes  # graphs and float biases take a third
    stored = onnx.load(store.root / rounded.file).graph.initializer
    matrices = [one.data_type for one in stored if len(one.dims) > 1]
    assert matrices == [onnx.TensorProto.INT8] * 5  # a convolution, two chains of two
    assert [one.stage for one in made.fidelities] == ["merged", "compressed", "int8"]
    ratio = made.artifacts[0].size_bytes / rounded.size_bytes
    assert f"{ratio:.1f} times in int8" in describe_smaller(made)
    before, after = (one.relative_error for one in made.fidelities[1:])
    assert before is not None
    assert after is not None
    assert before < after < before + 0.05


def test_a_budget_of_bytes_buys_more_parameters_of_fewer_bits(tmp_path: Path) -> None:
    whole, _ = build(tmp_path, Budget(size_bytes=12_000), "float32")
    made, _ = build(tmp_path, Budget(size_bytes=12_000), "int8", "float32")
    assert made.plan.unit == "bytes"
    assert made.plan.total_cost <= 12_000
    assert made.plan.total_parameters > 2 * whole.plan.total_parameters
    assert [one.key.title for one in made.artifacts] == ["dense onnx", "compressed onnx, int8"]
    assert "int8" in made.plan.weights.values()


def test_a_refined_model_of_chosen_types_is_rounded_once(tmp_path: Path) -> None:
    refine, budget = RefineChoice(steps=3, rounding="through"), Budget(size_bytes=9_000)
    made, store = build(tmp_path, budget, "int8", "int4", activations="float32", refine=refine)
    errors = {one.stage: one.relative_error for one in made.fidelities}
    assert errors["int4"] == errors["refined"] != errors["compressed"], "files hold the very weights that learned"
    assert verify_on_host(made, store, ParityChoice(), Steps(quiet=True))[1].max_relative_error < 1e-5


class Text(nn.Module):
    """A table of words, a layer norm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm, self.wide, self.head = (
            nn.Embedding(50, 64),
            nn.LayerNorm(64),
            nn.Linear(64, 160),
            nn.Linear(160, 5),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        y = torch.relu(self.wide(self.norm(self.words(tokens))))
        return torch.as_tensor(self.head(y.mean(1)))


def test_a_text_model_has_dynamic_activations_and_its_integers_are_in_the_file(tmp_path: Path) -> None:
    tokens = torch.randint(50, (96, 12), generator=torch.Generator().manual_seed(1))
    made, store = build(
        tmp_path, Budget(size_bytes=9_000), "int8", "int4", net=Text().eval(), x=tokens, activations="auto"
    )
    _, rounded = made.artifacts
    assert rounded.key.precision == "int4"
    found = read_weights(store.root / rounded.file)
    assert {one.precision for one in found} == set(made.plan.weights.values())
    assert verify_on_host(made, store, ParityChoice(), Steps(quiet=True))[1].max_relative_error < 1e-5


def test_a_second_build_reads_the_first(tmp_path: Path) -> None:
    first, _ = build(tmp_path, Budget(kept_parameters=0.6), "int8")
    again, _ = build(tmp_path, Budget(kept_parameters=0.6), "int8")
    assert again == first


def test_what_cannot_be_rounded_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(BudgetInfeasible, match="bytes"):
        build(tmp_path, Budget(size_bytes=100), "int8")
    with pytest.raises(InputError, match="needs types that the budget chooses"):
        build(tmp_path, Budget(kept_parameters=0.6), "int8", refine=RefineChoice(steps=3, rounding="through"))
    two = (Source(name="a", held=True), Source(name="b", held=True))
    data, merge = DataChoice(held=True), MergeChoice(head="head")
    recipe = Recipe(name="heads", models=two, data=data, merge=merge, precision=PrecisionChoice(weights=("int8",)))
    with pytest.raises(InputError, match="exported in float32 only"):
        check_recipe(recipe, "here")


class Tied(nn.Module):
    """A table of words that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.wide = nn.Embedding(300, 96), nn.Linear(96, 96)
        self.head = nn.Linear(96, 300, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.relu(self.wide(self.words(tokens)))).mean(1))


def test_a_tied_head_is_rounded_and_proven_with_its_table(tmp_path: Path) -> None:
    tokens = torch.randint(300, (64, 6), generator=torch.Generator().manual_seed(1))
    made, store = build(tmp_path, Budget(kept_parameters=1.0), "int8", net=Tied().eval(), x=tokens, activations="auto")
    rounded = made.artifacts[1]
    floats = [
        one.name
        for one in onnx.load(store.root / rounded.file).graph.initializer
        if len(one.dims) > 1 and min(one.dims) > 1 and one.data_type == onnx.TensorProto.FLOAT
    ]
    assert not floats, "the table is stored once, and rounded"
    assert verify_on_host(made, store, ParityChoice(), Steps(quiet=True))[1].max_relative_error < 1e-5


def test_another_choice_of_formats_is_another_plan(tmp_path: Path) -> None:
    one, _ = build(tmp_path, Budget(size_bytes=9_000), "int8", activations="dynamic", formats=("onnx",))
    other, _ = build(tmp_path, Budget(size_bytes=9_000), "int8", activations="dynamic", formats=("executorch",))
    assert one.plan.weights["first"] == "int8"
    assert other.plan.weights["first"] == "float32", "ExecuTorch has no convolutions with dynamic activations"
