"""One way from a model taken apart to a plan: every method of the recipe, on a trained net."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import Analysis, analyse
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.models.layers import count_parameters, find_layers
from rankship_pipeline.ranks.plan import is_language_model, make_plan
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.recipe.rank_methods import RankMethod

INPUTS = (torch.randn(24, 12, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    layers = find_layers(net)
    grams, curvatures = collect_grams(net, INPUTS, layers), collect_curvatures(net, INPUTS, layers)
    metrics = {name: Metric(gram=gram, curvature=curvatures[name]) for name, gram in grams.items()}
    return analyse(net, layers, metrics, "eigen")


@pytest.mark.parametrize("method", get_args(RankMethod))
def test_every_method_of_the_recipe_gives_a_plan(method: RankMethod, analysis: Analysis) -> None:
    fixed = count_parameters(analysis.model) - sum(one.layer.parameters for one in analysis.layers.values())
    budget = int(0.6 * count_parameters(analysis.model))
    choice = RankChoice(method=method, step=1, steps=5, probes=8, sensitivity="kl")
    plan = make_plan(analysis, choice, fixed, budget, INPUTS, {})
    assert plan.method == method
    assert plan.budget_cost == budget
    if method != "ara-original":  # as published it may miss its budget
        assert plan.total_parameters <= budget


def test_measuring_around_a_plan_keeps_the_budget(analysis: Analysis) -> None:
    fixed = count_parameters(analysis.model) - sum(one.layer.parameters for one in analysis.layers.values())
    budget = int(0.6 * count_parameters(analysis.model))
    choice = RankChoice(step=1, probes=8, sensitivity="kl", passes=2)
    plan = make_plan(analysis, choice, fixed, budget, INPUTS, {})
    assert 0 <= plan.gap <= max(one.layer.rows + one.layer.columns for one in analysis.layers.values())


class Reader(nn.Module):
    """Tokens in, logits for every position out: ARA trains on the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.relu(self.body(self.table(ids)))))


def test_ara_reads_a_language_models_own_text() -> None:
    torch.manual_seed(0)
    net, inputs = Reader().eval(), (torch.randint(11, (6, 9)),)
    layers = find_layers(net)
    metrics = {name: Metric(gram=gram) for name, gram in collect_grams(net, inputs, layers).items()}
    fixed = count_parameters(net) - sum(layer.parameters for layer in layers)
    budget = int(0.8 * count_parameters(net))
    choice = RankChoice(method="ara", step=1, steps=4)
    plan = make_plan(analyse(net, layers, metrics, "eigen"), choice, fixed, budget, inputs, {})
    assert 0 <= plan.gap < 40


class Placed(Reader):
    """One with a larger table, of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(64, self.table.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        return torch.as_tensor(self.head(torch.relu(self.body(words))))


class Tagger(nn.Module):
    """Classes of words, from all words of the text; a masked model where there are as many classes as words."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 16), nn.Linear(16, classes)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.table(ids)
        return torch.as_tensor(self.head(words + words.mean(1, keepdim=True)))


@pytest.mark.parametrize(
    ("net", "language"), [(Reader(), True), (Placed(), True), (Tagger(3), False), (Tagger(11), False)]
)
def test_only_a_model_of_the_next_token_is_a_language_model(net: nn.Module, *, language: bool) -> None:
    assert is_language_model(net.eval(), (torch.randint(11, (6, 9)),)) is language


def test_measures_on_no_more_samples_than_their_outputs_have_place_for(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankship_pipeline.ranks.plan._OUTPUT_BYTES", 4 * 4 * 5)  # five samples
    seen = []

    def note(_analysis: object, stats: object, inputs: tuple[Tensor], *_: object) -> object:
        seen.append(len(inputs[0]))
        return stats

    monkeypatch.setattr("rankship_pipeline.ranks.plan.measure_curves", note)
    total = count_parameters(analysis.model)
    fixed = total - sum(one.layer.parameters for one in analysis.layers.values())
    make_plan(analysis, RankChoice(step=1, sensitivity="kl", probes=16), fixed, int(0.8 * total), INPUTS, {})
    assert seen == [5]
