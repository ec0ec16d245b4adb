"""Caching between recipes that share a store: a result is read again only where nothing that shaped it changed."""

from pathlib import Path
from typing import Any

import pytest

from make.nets import is_same
from make.recipes import TRAIN, state_model, state_rest
from make.recipes import make_stages as open_stages
from rankship_pipeline.flow.budget import check_budget, price_recipe
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.stage_model import Model
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import CostTable, Factors, LayerCost, LayerRank, RankPlan
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.layers import get_layer
from rankship_pipeline.quantise.grid import is_on_grid, read_rows
from rankship_pipeline.quantise.in_order import find_grids, round_layers
from rankship_pipeline.recipe.choices import Comparison
from rankship_pipeline.recipe.merge_methods import MergeMethod
from rankship_pipeline.recipe.rules import read_recipe

NET = (
    """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12)
        self.tied = nn.Linear(12, 12)
        self.tied_again = nn.Linear(12, 12)
        self.tied_again.weight = self.tied.weight
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.tied_again(self.tied(self.norm(self.stem(x)))))

def load():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    return {"calibration": {"a": x[:20], "b": x[10:30]}, "test_inputs": x, "test_labels": torch.arange(40) % 3}
"""
    + TRAIN
)
MODELS = state_model("a", "net.py:Net", train="net.py:train") + state_model(
    "b", "net.py:Net", train="net.py:train_other"
)
RECIPE = f'name = "tiny"\n{MODELS}{state_rest(0.85)}'


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def compress(stages: Stages, way: Comparison) -> tuple[Model, RankPlan]:
    return stages.compress(price_recipe(stages.prepared), way)


def make_stages(store: Store, extra: str = "", budget: str = "kept_parameters = 0.85") -> Stages:
    folder = store.root.parent
    (folder / "net.py").write_text(NET)
    path = folder / "recipe.toml"
    path.write_text(RECIPE.replace("kept_parameters = 0.85", budget) + extra)
    return open_stages(path, store)


def make_comparison(name: str = "one", **change: Any) -> Comparison:  # noqa: ANN401
    chosen = {"merge": "joint", "ranks": "knapsack", "whitening": "eigen", **change}
    return Comparison(name=name, **chosen)


def count_entries(store: Store) -> int:
    return len(list(store.root.iterdir()))


def test_a_second_run_reads_everything_and_makes_nothing(store: Store) -> None:
    first, plan = compress(make_stages(store), make_comparison())
    made = count_entries(store)
    stages = make_stages(store)
    second, same_plan = compress(stages, make_comparison())
    assert plan == same_plan
    assert is_same(first.module, second.module)
    assert count_entries(store) == made
    assert stages.steps.seconds == {}


def test_a_compressed_model_meets_its_budget_with_tied_weights_in_it(store: Store) -> None:
    stages = make_stages(store)
    compressed, plan = compress(stages, make_comparison())
    assert sum(parameter.numel() for parameter in compressed.module.parameters()) == plan.total_parameters
    assert plan.total_parameters <= price_recipe(stages.prepared).budget
    assert [layer.name for layer in plan.layers] == ["stem", "head"]
    assert compressed.module.get_submodule("tied").weight is compressed.module.get_submodule("tied_again").weight


WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"curvature": True},
    {"curvature": True, "sensitivity": "gradient"},
    {"reconstruct": True},
    {"sensitivity": "kl"},
    {"sensitivity": "kl", "passes": 1},
    {"ranks": "strs", "sensitivity": "kl"},
    {"ranks": "uniform"},
    {"whitening": "swift"},
)


def test_every_way_meets_the_budget_and_none_is_taken_for_another(store: Store) -> None:
    stages = make_stages(store)
    keys = set()
    for change in WAYS:
        model, plan = compress(stages, make_comparison(**change))
        keys.add(model.entry.key)
        assert sum(parameter.numel() for parameter in model.module.parameters()) == plan.total_parameters
        assert plan.total_parameters <= price_recipe(stages.prepared).budget
        assert plan.factors
        assert model.module(stages.prepared.data.test_inputs[0]).isfinite().all()
        again, same_plan = compress(make_stages(store), make_comparison(**change))
        assert same_plan == plan
        assert is_same(model.module, again.module)
    assert len(keys) == len(WAYS)


@pytest.mark.parametrize("method", ["average", "joint"])
def test_grams_are_collected_anew_when_fewer_layers_are_excluded(store: Store, method: MergeMethod) -> None:
    make_stages(store, 'exclude = ["head"]').merge(method)
    _, interference = make_stages(store).merge(method)
    assert list(interference) == ["stem", "head"]


def test_whitening_never_falls_back_to_plain_for_a_layer_that_another_recipe_excluded(store: Store) -> None:
    def find_head(plan_layers: tuple[LayerRank, ...]) -> LayerRank:
        return next(layer for layer in plan_layers if layer.name == "head")

    compress(make_stages(store, 'exclude = ["head"]'), make_comparison(merge="average"))
    shared = compress(make_stages(store), make_comparison(merge="average"))[1]
    fresh_store = Store(store.root.parent / "fresh")
    alone = compress(make_stages(fresh_store), make_comparison(merge="average"))[1]
    assert find_head(shared.layers) == find_head(alone.layers)


def test_a_renamed_comparison_is_evaluated_under_its_new_name(store: Store) -> None:
    stages = make_stages(store)
    for name in ("one", "two"):
        model, _ = compress(stages, make_comparison(name))
        assert [one.stage for one in Scores(stages).evaluate(model, f"alternative:{name}")] == [f"alternative:{name}"]


@pytest.mark.parametrize(
    "change", ["[merge]\noff_diagonal = 0.5", "seed = 1", "[merge]\nbatchnorm = 'keep'", "[merge]\nmethod = 'average'"]
)
def test_what_shapes_a_merged_model_makes_another_one(store: Store, change: str) -> None:
    key = make_stages(store).merge("joint")[0].entry.key
    text = RECIPE
    extra = change if change.startswith("[") else ""
    top = "" if extra else change
    folder = store.root.parent
    (folder / "other.toml").write_text(top + "\n" + text + extra)
    recipe = read_recipe(folder / "other.toml")
    other = Stages(prepare(recipe, folder), store, Steps(quiet=True)).merge(recipe.merge.method)[0].entry.key
    assert other != key


def test_one_model_is_its_own_merge_and_has_no_interference(store: Store) -> None:
    stages = make_stages(store)
    single = RECIPE.replace(RECIPE[RECIPE.index('[[models]]\nname = "b"') : RECIPE.index("[data]")], "")
    folder = store.root.parent
    (folder / "net.py").write_text(NET.replace(', "b": x[10:30]', ""))
    (folder / "single.toml").write_text(single + '\n[merge]\nbatchnorm = "keep"\n')
    stages = Stages(prepare(read_recipe(folder / "single.toml"), folder), store, Steps(quiet=True))
    source = stages.load_source(stages.prepared.recipe.models[0].name)
    for method in ("average", "joint"):
        merged, interference = stages.merge(method)
        assert interference == {}
        assert is_same(merged.module, source.module)


def test_a_budget_of_operations_is_met_in_operations(store: Store) -> None:
    _, plan = compress(make_stages(store, budget="kept_flops = 0.9"), make_comparison())
    dense = 2 * (6 * 12 + 12 * 12 + 12 * 12 + 12 * 3)  # the tied matrix runs twice and is stored once
    assert (plan.unit, plan.budget_cost) == ("flops", int(0.9 * dense))
    assert plan.total_cost == dense - sum(2 * (one.dense_parameters - one.chosen_parameters) for one in plan.layers)
    assert plan.total_cost <= plan.budget_cost


def test_a_budget_of_bytes_is_met_by_rounded_weights_that_stay_the_models_function(store: Store) -> None:
    dense = make_stages(store).prepared.dense_parameters
    extra = '[precision]\nweights = ["int8", "int4"]\n'
    stages = make_stages(store, extra, f"size_bytes = {3 * dense}")
    model, plan = compress(stages, make_comparison())
    assert (plan.unit, plan.budget_cost) == ("bytes", 3 * dense)
    assert plan.total_cost <= plan.budget_cost
    assert set(plan.weights.values()) == {"int8"}  # widths of 6 and 12 are no multiples of 32
    inputs = stages.prepared.data.pool_calibration()
    rounded, _ = stages.settle(round_layers(model.module, plan.weights, inputs))
    for name, grid in find_grids(rounded, plan.weights).items():
        assert is_on_grid(read_rows(get_layer(rounded, name)), grid.precision, grid.block)
    wanted, found = model.module(*inputs).detach(), rounded(*inputs).detach()
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    with pytest.raises(BudgetInfeasible, match="bytes"):
        check_budget(make_stages(store, extra, "size_bytes = 99").prepared)


def test_a_budget_of_time_takes_a_table_and_another_table_makes_another_model(store: Store) -> None:
    table = store.root.parent / "costs.json"
    keys = []
    for cost in (400, 500):
        options = (LayerCost(factors=None, cost=900), LayerCost(factors=Factors(rank=2), cost=cost))
        dense = (LayerCost(factors=None, cost=100),)
        layers = {"stem": options, "head": dense}
        written = CostTable(
            unit="ns",
            device="pi4",
            format="onnx",
            runtime="onnxruntime 1",
            threads=1,
            agent_sha256="a",
            measured_utc="2026-11-25T00:00:00Z",
            rounds=9,
            model_sha256=make_stages(store).prepared.hash_model(),
            dense=1050,
            fixed=50,
            layers=layers,
        )
        table.write_text(encode(written))
        stages = make_stages(store, budget='latency_us = 1\ncosts = "costs.json"')
        model, plan = compress(stages, make_comparison())
        assert (plan.unit, plan.total_cost, plan.budget_cost) == ("ns", 150 + cost, 1000)
        assert plan.factors == {"stem": Factors(rank=2)}
        assert stages.prepared.source_sha256["costs costs.json"] == hash_file(table)
        keys.append(model.entry.key)
    assert keys[0] != keys[1]
