"""Recipes of models whose head has their embedding's weight: budgets, every way to allocate, and what is gained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from make.recipes import make_stages as open_stages
from make.recipes import state_model, state_rest
from make.tied import VOCABULARY, WIDTH, make_speaker, speak
from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.flow.budget import price_recipe
from rankship_pipeline.flow.idle import keep_idle_dense
from rankship_pipeline.flow.replaceable import find_unreplaceable, keep_dense
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.records import Stored
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.ranks.call_sites import find_sites
from rankship_pipeline.ranks.price import price_flops
from rankship_pipeline.recipe.choices import Comparison

KEPT = 0.6


def make_stages(folder: Path, extra: str = "") -> Stages:
    (folder / "net.py").write_text("from make.tied import Speaker, load, train\n")
    model = state_model("a", "net.py:Speaker", train="net.py:train")
    (folder / "recipe.toml").write_text(f'name = "tied"\n{model}{state_rest(KEPT)}{extra}')
    return open_stages(folder / "recipe.toml", Store(folder / "store"))


def compress(stages: Stages, **change: Any) -> float:  # noqa: ANN401
    """The divergence from the dense model, in nats, of what meets the budget exactly as planned."""
    chosen = {"merge": "average", "ranks": "knapsack", "whitening": "eigen", "curvature": True, **change}
    budgeted = price_recipe(stages.prepared)
    model, plan = stages.compress(budgeted, Comparison(name="one", **chosen))
    assert sum(one.numel() for one in model.module.parameters()) == plan.total_parameters <= budgeted.budget
    dense, inputs = stages.load_source("a").module, stages.prepared.data.test_inputs
    return measure_divergence(model.module, inputs, predict(dense, inputs))


def test_the_pair_is_factored_to_the_budget_and_loses_less_than_where_it_stays_dense(tmp_path: Path) -> None:
    stages = make_stages(tmp_path)
    assert [layer.name for layer in stages.prepared.layers] == ["words", "body.0", "body.2"]
    together = compress(stages)
    (tmp_path / "alone").mkdir()
    alone = make_stages(tmp_path / "alone", 'exclude = ["head"]\n')
    assert [layer.name for layer in alone.prepared.layers] == ["body.0", "body.2"]
    assert together < 0.5 * compress(alone)


@pytest.mark.parametrize(
    "change",
    [
        {"curvature": False},
        {"whitening": "plain", "curvature": False},
        {"sensitivity": "kl"},
        {"reconstruct": True},
        {"ranks": "ara"},
        {"ranks": "uniform", "whitening": "swift"},
        {"merge": "regmean"},
    ],
    ids=str,
)
def test_every_way_meets_the_budget(tmp_path: Path, change: dict[str, Any]) -> None:
    assert compress(make_stages(tmp_path), **change) < 1


def test_a_pair_is_not_idle_though_a_graph_reads_it_under_one_name(tmp_path: Path) -> None:
    prepared = make_stages(tmp_path).prepared
    assert keep_idle_dense(keep_dense(prepared)).layers == prepared.layers


def test_an_embedding_that_is_called_only_under_its_heads_name_may_be_replaced() -> None:
    model = make_speaker()
    (pair,) = (layer for layer in find_layers(model) if layer.tied)
    assert find_unreplaceable(model, (pair,), (speak(2),)) == {}


def test_a_pair_costs_the_lookup_and_the_heads_products() -> None:
    model = make_speaker()
    (pair,) = (layer for layer in find_layers(model) if layer.tied)
    tokens = (speak(1, length=5),)
    price = price_flops(model, (pair,), tokens)
    assert price.price_layer(pair, Stored()) == 2 * 5 * VOCABULARY * WIDTH
    assert [site.kind for site in find_sites(model, (pair,), tokens)["words"]] == ["embedding", "linear"]
    assert torch.equal(model.head.weight, model.words.weight)
