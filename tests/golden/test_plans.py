"""Rank plans and factor errors of one fixed net, against numbers stored when they were last judged right.

They change only when a method changes on purpose. Then regenerate, read the difference, and commit it with the change:

    RANKSHIP_REGENERATE_GOLDEN=1 pytest tests/golden; git diff tests/golden

Regenerating never passes a test, and is refused where CI is set.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import analyse
from rankship_pipeline.factors.decompose import WHITENINGS, Metric, truncate
from rankship_pipeline.factors.forms import approximate
from rankship_pipeline.foundation.records import Factors, RankPlan
from rankship_pipeline.merge.grams import output_energy
from rankship_pipeline.models.layers import as_matrix, count_parameters, find_layers, get_layer
from rankship_pipeline.ranks.budget import keep_to_method
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.stats import gather_stats
from rankship_pipeline.recipe.choices import RankChoice

STORED = Path(__file__).with_name("plans.json")
STEP = 2
SVD = RankChoice(step=STEP, forms=("svd",))
# name → how ranks are chosen, and whether outputs are weighed by their curvature
WAYS: dict[str, tuple[RankChoice, bool]] = {
    "uniform": (replace(SVD, method="uniform"), False),
    "arp": (replace(SVD, method="arp"), False),
    "knapsack": (SVD, False),
    "strs": (replace(SVD, method="strs"), False),
    "knapsack, all forms": (RankChoice(step=STEP), False),
    "knapsack, all forms, gradient": (RankChoice(step=STEP, sensitivity="gradient"), True),
}
KEPT = (0.6, 0.8)
FORMS = (Factors(form="spatial", rank=4), Factors(form="tucker", rank=6, input_rank=4))


class Net(nn.Module):
    """Two convolutions and two linear layers, filled by numpy so that no release of torch changes them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 12, 3, padding=1)
        self.body = nn.Conv2d(12, 16, 3, stride=2)
        self.mix = nn.Linear(16, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 2, 7, 7) to logits (batch, 5)."""
        y = torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3))
        logits: Tensor = self.head(torch.relu(self.mix(y)))
        return logits


def make_net(random: np.random.Generator) -> nn.Module:
    net = Net().double().eval()  # so that no processor's float32 kernels change the numbers
    with torch.no_grad():
        for parameter in net.parameters():
            values = random.normal(size=tuple(parameter.shape))
            if values.ndim > 1:  # a falling spectrum, as trained weights have
                flat = values.reshape(len(values), -1)
                U, sigma, Vh = np.linalg.svd(flat, full_matrices=False)
                values = ((U * sigma * 0.8 ** np.arange(len(sigma))) @ Vh / np.sqrt(flat.shape[1])).reshape(
                    values.shape
                )
            parameter.copy_(torch.tensor(values))
    return net


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the code gives today."""
    random = np.random.default_rng(2025)
    net, layers = make_net(random), find_layers(Net())
    inputs = (torch.tensor(random.normal(size=(100, 2, 7, 7))),)
    grams = collect_grams(net, inputs, layers)
    dense = count_parameters(net)
    fixed = dense - sum(layer.parameters for layer in layers)
    curvatures = collect_curvatures(net, inputs, layers, draws=8)  # exact for up to 8 classes
    analyses = {
        curved: analyse(
            net,
            layers,
            {name: Metric(gram=gram, curvature=curvatures[name] if curved else None) for name, gram in grams.items()},
            "eigen",
        )
        for curved in (False, True)
    }
    plans = {}
    for name, (choice, curved) in WAYS.items():
        stats = gather_stats(analyses[curved], keep_to_method(choice), {})
        for kept in KEPT:
            plans[f"{name} {kept}"] = summarise(allocate(stats, fixed, int(kept * dense), choice))
    losses = {
        f"{layer.name} {whitening} rank {rank}": measure_loss(net, layer.name, grams[layer.name], whitening, rank)
        for layer in layers
        for whitening in WHITENINGS
        for rank in (1, 4)
    }
    for layer in layers[:2]:
        taken = analyses[False].layers[layer.name]
        for factors in FORMS:
            error = output_energy(taken.weight - approximate(taken, factors), grams[layer.name])
            losses[f"{layer.name} {factors}"] = error / output_energy(taken.weight, grams[layer.name])
    result = {"dense parameters": dense, "plans": plans, "losses": losses}
    if os.environ.get("RANKSHIP_REGENERATE_GOLDEN"):
        assert not os.environ.get("CI"), "golden numbers are never regenerated in CI"
        STORED.write_text(json.dumps(result, indent=1) + "\n")
        pytest.fail(f"{STORED.name} is written anew: read its difference, then run again without the variable")
    return result


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """What was judged right."""
    table: dict[str, Any] = json.loads(STORED.read_text())
    return table


def summarise(plan: RankPlan) -> dict[str, Any]:
    return {
        "layers": {layer.name: str(layer.factors or "dense") for layer in plan.layers},
        "parameters": plan.total_parameters,
        "gap": plan.gap,
        "errors": {layer.name: layer.relative_error for layer in plan.layers},
    }


def measure_loss(net: nn.Module, name: str, gram: Tensor, whitening: str, rank: int) -> float:
    """Output energy lost by a layer's two factors, as a share of all its output energy."""
    W = as_matrix(get_layer(net, name))
    A, B = truncate(WHITENINGS[whitening](W, gram), rank)
    return output_energy(W - A @ B, gram) / output_energy(W, gram)


def test_the_stored_numbers_cover_every_method_budget_and_layer(found: dict[str, Any], stored: dict[str, Any]) -> None:
    assert list(stored["plans"]) == list(found["plans"])
    assert list(stored["losses"]) == list(found["losses"])
    assert stored["dense parameters"] == found["dense parameters"]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("way", WAYS)
def test_ranks_are_the_stored_ones_exactly(
    way: str, kept: float, found: dict[str, Any], stored: dict[str, Any]
) -> None:
    plan, golden = found["plans"][f"{way} {kept}"], stored["plans"][f"{way} {kept}"]
    assert plan["layers"] == golden["layers"]
    assert (plan["parameters"], plan["gap"]) == (golden["parameters"], golden["gap"])
    assert plan["errors"] == pytest.approx(golden["errors"], rel=1e-6)


def test_factor_errors_are_the_stored_ones(found: dict[str, Any], stored: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(stored["losses"], rel=1e-6)
