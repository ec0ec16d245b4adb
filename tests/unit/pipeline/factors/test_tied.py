"""An embedding and the head that has its weight: factored as one, stored once, tied after loading."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from make.tied import VOCABULARY, WIDTH, Speaker, make_speaker, speak
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.export.graph import expect_operators, trace_graph
from rankship_pipeline.export.onnx import export_graph, list_operators
from rankship_pipeline.factors.analysis import analyse, fill
from rankship_pipeline.factors.decompose import Metric, join_metrics
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import list_operators as list_chain
from rankship_pipeline.factors.rebuild import rebuild
from rankship_pipeline.factors.saved_model import WEIGHTS, load_model, save_model
from rankship_pipeline.foundation.records import Factors, LayerRank, RankPlan
from rankship_pipeline.models.layers import Layer, count_parameters, find_layers

RANK = 8
TOKENS = speak(16)


def find_words(model: nn.Module) -> Layer:
    (layer,) = (one for one in find_layers(model) if one.kind == "embedding")
    return layer


def factor(model: nn.Module, rank: int) -> nn.Module:
    layer = find_words(model)
    return fill(analyse(model, (layer,), {}, "plain"), {layer.name: Factors(rank=rank)})


def make_plan(model: nn.Module, rank: int) -> RankPlan:
    layer, factors = find_words(model), Factors(rank=rank)
    kept = rank * (VOCABULARY + WIDTH)
    ranked = LayerRank(
        name=layer.name,
        rows=layer.rows,
        columns=layer.columns,
        factors=factors,
        operators=tuple(one.shape for one in list_chain(layer, factors)),
        dense_parameters=layer.parameters,
        chosen_parameters=kept,
        relative_error=0.0,
        interference=None,
    )
    fixed = count_parameters(model) - layer.parameters
    return RankPlan(
        method="test",
        layers=(ranked,),
        fixed_parameters=fixed,
        total_parameters=fixed + kept,
        unit="parameters",
        total_cost=fixed + kept,
        budget_cost=fixed + kept,
        predicted_error=0.0,
    )


@torch.inference_mode()
def test_at_full_rank_both_uses_compute_the_same() -> None:
    model = make_speaker()
    torch.testing.assert_close(factor(model, WIDTH)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_at_a_low_rank_both_uses_have_the_same_weight() -> None:
    model = make_speaker()
    factored = factor(model, RANK)
    table = factored.get_submodule("words")(torch.arange(VOCABULARY))
    dense = Speaker().eval()
    dense.load_state_dict(model.state_dict())
    dense.words.weight.copy_(table)
    assert float((table - model.words.weight).norm()) > 0.1
    torch.testing.assert_close(factored(TOKENS), dense(TOKENS), rtol=1e-4, atol=1e-4)


def test_the_pair_and_its_bias_are_stored_once() -> None:
    model = make_speaker()
    factored = factor(model, RANK)
    assert count_parameters(factored) == make_plan(model, RANK).total_parameters
    assert factored.get_submodule("head").bias is factored.bias


def test_further_embeddings_are_the_same_layer() -> None:
    model = make_speaker()
    model.more = nn.Embedding(VOCABULARY, WIDTH)
    model.more.weight = model.words.weight
    layer = find_words(model)
    assert [use.name for use in layer.uses] == ["words", "head", "more"]
    factored = factor(model, RANK)
    assert torch.equal(factored.get_submodule("more")(TOKENS), factored.get_submodule("words")(TOKENS))


def test_a_saved_pair_is_stored_once_and_tied_when_loaded(tmp_path: Path) -> None:
    model = make_speaker()
    factored = factor(model, RANK)
    save_model(tmp_path, factored, make_plan(model, RANK))
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - it is no mapping
    assert stored == make_plan(model, RANK).total_parameters
    loaded, _ = load_model(tmp_path, into=Speaker())
    assert torch.equal(loaded(TOKENS), factored(TOKENS))
    assert loaded.get_parameter("head.1.weight") is loaded.get_parameter("words.0.weight")
    assert loaded.get_parameter("head.0.weight") is loaded.get_parameter("words.1.weight")


def test_an_onnx_file_holds_the_table_once(tmp_path: Path) -> None:
    model = make_speaker(2000)  # small constants are folded where they are used, each into a copy
    factored, file = factor(model, RANK), tmp_path / "model.onnx"
    graph = trace_graph(factored, (TOKENS,))
    export_graph(graph, file)
    shapes = [(one.rows, one.columns) for one in list_operators(file)]
    assert sorted(shapes) == sorted((one.rows, one.columns) for one in expect_operators(graph).needed)
    chained = [one.shape for one in list_chain(find_words(model), Factors(rank=RANK))]
    assert chained == [(WIDTH, RANK), (RANK, WIDTH), (2000, RANK)]
    assert {*chained} <= {*shapes}
    assert file.stat().st_size < 4 * (count_parameters(factored) + 0.5 * 2000 * RANK)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: TOKENS.numpy()})
    np.testing.assert_allclose(found, factored(TOKENS).detach().numpy(), rtol=1e-4, atol=1e-4)


def collect(model: nn.Module, layer: Layer, *, curved: bool) -> Metric:
    grams = collect_grams(model, (TOKENS,), (layer,))
    curvature = collect_curvatures(model, (TOKENS,), (layer,))[layer.name] if curved else None
    return join_metrics(Metric(gram=grams["words"], curvature=curvature), [Metric(gram=grams["head"])])


@pytest.mark.parametrize("curved", [True, False])
def test_the_metric_adds_up_the_errors_of_both_uses(curved: bool) -> None:  # noqa: FBT001
    model = make_speaker()
    layer = find_words(model)
    grams = collect_grams(model, (TOKENS,), (layer,))
    f, G = grams["words"], grams["head"]
    H = collect_curvatures(model, (TOKENS,), (layer,))["words"] if curved else torch.eye(WIDTH, dtype=torch.float64)
    scale = f.sum() if curved else G.diagonal().mean()
    D = torch.randn(WIDTH, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    looked_up = (f * (D * (H @ D)).sum(0)).sum()
    scored = (f * (D * (G @ D)).sum(0)).sum() / scale
    metric = collect(model, layer, curved=curved)
    assert metric.curvature is not None
    taken = Decomposition(layer, D, metric, "eigen")
    ridge = 0.01 * metric.curvature.diagonal()  # see decompose.damp
    assert taken.total == pytest.approx(float(looked_up + scored + (f * (D * ridge[:, None] * D).sum(0)).sum()))


def test_a_head_that_never_ran_leaves_the_embeddings_metric() -> None:
    metric = Metric(gram=torch.ones(VOCABULARY, dtype=torch.float64))
    unseen = Metric(gram=torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
    assert join_metrics(metric, [unseen]) is metric


@torch.inference_mode()
def test_a_chain_is_made_for_what_a_plan_names_and_what_is_tied_to_it() -> None:
    model = make_speaker()
    factored = rebuild(model, {"words": Factors(rank=RANK)})
    assert isinstance(factored.get_submodule("head"), nn.Sequential)
    assert isinstance(factored.get_submodule("body.0"), nn.Linear)
    assert isinstance(model.head.weight, Tensor)  # the model itself is as it was
