"""Of two plans, by relative errors and by second-order effects, the one that changes the predictions less."""

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.evaluate.lead import measure_lead
from rankship_pipeline.factors.analysis import Analysis, analyse
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.ranks import sensitivity
from rankship_pipeline.ranks.allocators import allocate_knapsack
from rankship_pipeline.ranks.sensitivity import try_sensitivities
from rankship_pipeline.ranks.stats import gather_stats
from rankship_pipeline.recipe.choices import RankChoice

CHOICE = RankChoice(step=1, forms=("svd",))
X = (torch.randn(150, 12, generator=torch.Generator().manual_seed(3)),)
AVAILABLE = 450  # parameters of 816


class Net(nn.Module):
    """Two branches of equal energy at their own outputs, one of which the predictions hardly see."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.seen, self.unseen, self.head = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 10)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.norm(self.seen(x))) + 0.01 * torch.relu(self.unseen(x)))
        return 4 * y


def take_apart(*, curved: bool = True, norm: nn.Module | None = None) -> Analysis:
    torch.manual_seed(0)
    net = Net(nn.Identity() if norm is None else norm).eval()
    layers = find_layers(net)
    grams, curvatures = collect_grams(net, X, layers), collect_curvatures(net, X, layers, draws=16)
    metrics = {name: Metric(gram=gram, curvature=curvatures[name] if curved else None) for name, gram in grams.items()}
    return analyse(net, layers, metrics, "swift")


def choose(analysis: Analysis) -> str:
    stats = gather_stats(analysis, CHOICE, {})
    return try_sensitivities(analysis, stats, CHOICE, AVAILABLE, X, None).sensitivity


def test_the_plan_that_diverges_less_is_taken() -> None:
    analysis = take_apart()
    stats = gather_stats(analysis, CHOICE, {})
    teacher = predict(analysis.model, X)
    damages = {
        one: sensitivity._measure_plan(
            analysis, stats, allocate_knapsack(stats, AVAILABLE, RankChoice(step=1, sensitivity=one)), X, teacher, None
        )
        for one in ("relative", "gradient")
    }
    assert damages["gradient"] < 0.8 * damages["relative"]
    assert choose(analysis) == "gradient"


def test_the_other_one_is_taken_where_it_diverges_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "measure_lead", lambda *given: -measure_lead(*given))
    assert choose(take_apart()) == "relative"


@pytest.mark.parametrize(
    "analysis", [take_apart(curved=False), take_apart(norm=nn.BatchNorm1d(24))], ids=["flat", "norm"]
)
def test_it_is_relative_without_curvature_and_with_batchnorm(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "measure_lead", None)  # not called
    assert choose(analysis) == "relative"
