"""Plans and models are the same whether layers of one long side are known by both sides or by the shorter one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rankship_pipeline.evaluate.calibrate import collect_halves
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors import decompose
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import fit_metric
from rankship_pipeline.models.layers import as_matrix, find_layers, get_layer
from rankship_pipeline.ranks.losses import measure_losses
from rankship_pipeline.ranks.plan import make_plan
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.recover.reconstruct import reconstruct

X = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, 10)).eval()


def take_apart(net: nn.Module, *, only_factored: bool, shrunk: bool) -> Analysis:
    layers = tuple(replace(layer, only_factored=only_factored) for layer in find_layers(net))
    grams = collect_halves(collect_grams, net, (X,), layers)
    curvatures = collect_halves(collect_curvatures, net, (X,), layers)
    metrics = {
        name: fit_metric(as_matrix(get_layer(net, name)), gram, curvatures[name], len(X), shrunk=shrunk)
        for name, gram in grams.items()
    }
    return analyse(net, layers, metrics, "swift")


@pytest.mark.parametrize("sensitivity", ["gradient", "kl", "relative"])
@pytest.mark.parametrize("shrunk", [False, True])
def test_the_shorter_side_gives_the_same_plan_and_model(
    monkeypatch: pytest.MonkeyPatch, sensitivity: str, *, shrunk: bool
) -> None:
    """What is added to a curvature and how it is shrunk are relative to a basis; exact is what comes without them."""
    monkeypatch.setattr("rankship_pipeline.models.layers._LONG", 40)
    if not shrunk:
        monkeypatch.setattr(decompose, "CURVATURE_RIDGE", 0.0)
    net, choice = make_net(), RankChoice(step=1, sensitivity=sensitivity)  # type: ignore[arg-type]  # one of them
    both = [take_apart(net, only_factored=one, shrunk=shrunk) for one in (False, True)]
    assert [one.outer is None for one in both[1].layers.values()] == [False, False, True]
    assert all(one.outer is None for one in both[0].layers.values())
    plans = [measure_losses(make_plan(one, choice, 62, 560, (X,), {}), one, len(X)) for one in both]
    assert plans[1].factors == plans[0].factors
    assert len(plans[0].factors) > 1
    for first, second in zip(plans[0].layers, plans[1].layers, strict=True):
        assert second.relative_error == pytest.approx(first.relative_error, rel=0.2 if shrunk else 1e-5, abs=1e-9)
    for rebuild in (fill, lambda one, factors: reconstruct(one, factors, (X,))):
        models = net, *(rebuild(one, plans[0].factors) for one in both)
        with torch.no_grad():
            dense, first, second = (model(X) for model in models)
        lost = float((first - dense).norm())
        assert float((second - first).norm()) < (0.3 if shrunk else 1e-3) * lost
