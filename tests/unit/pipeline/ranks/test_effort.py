"""Measuring gives way to the second-order estimate where it would take too long, in one line."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import Analysis, analyse
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.models.layers import count_parameters, find_layers
from rankship_pipeline.ranks import effort
from rankship_pipeline.ranks import plan as plans
from rankship_pipeline.ranks.effort import count_effort
from rankship_pipeline.ranks.plan import make_plan
from rankship_pipeline.ranks.stats import LayerStats, gather_stats
from rankship_pipeline.recipe.choices import RankChoice

INPUTS = (torch.randn(24, 12, generator=torch.Generator().manual_seed(0)),)
MEASURED = RankChoice(step=1, probes=16, sensitivity="kl", passes=1)
ESTIMATED = RankChoice(step=1, probes=16, sensitivity="gradient")


def take_apart(*, curved: bool) -> Analysis:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    layers = find_layers(net)
    curvatures = collect_curvatures(net, INPUTS, layers) if curved else {}
    grams = collect_grams(net, INPUTS, layers)
    metrics = {name: Metric(gram=gram, curvature=curvatures.get(name)) for name, gram in grams.items()}
    return analyse(net, layers, metrics, "eigen")


def plan(analysis: Analysis, choice: RankChoice, said: list[str]) -> list[object]:
    fixed = count_parameters(analysis.model) - sum(one.layer.parameters for one in analysis.layers.values())
    budget = int(0.6 * count_parameters(analysis.model))
    return list(make_plan(analysis, choice, fixed, budget, INPUTS, {}, say=said.append).layers)


def test_above_the_stated_effort_the_estimate_answers_and_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis, said, ran = take_apart(curved=True), list[str](), list[Sequence[LayerStats]]()

    def measure(_analysis: Analysis, stats: Sequence[LayerStats], *_: object) -> Sequence[LayerStats]:
        ran.append(stats)
        return stats

    for name in ("measure_curves", "improve"):
        monkeypatch.setattr(plans, name, measure)
    estimated = plan(analysis, ESTIMATED, said)
    monkeypatch.setattr(effort, "MOST_FLOPS", 1.0)
    assert plan(analysis, MEASURED, said) == estimated
    assert not ran
    (line,) = said
    assert "3 layers" in line
    assert "gradient" in line


def test_without_curvature_all_is_measured_and_the_user_is_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis, said = take_apart(curved=False), list[str]()
    measured = plan(analysis, MEASURED, said)
    assert not said  # below it
    monkeypatch.setattr(effort, "MOST_FLOPS", 1.0)
    assert plan(analysis, MEASURED, said) == measured
    (line,) = said
    assert "curvature = true" in line


def test_the_effort_counts_layers_sizes_samples_and_passes() -> None:
    analysis = take_apart(curved=False)
    stats = gather_stats(analysis, MEASURED, {})
    once = 2 * (12 * 24 + 24 * 24 + 24 * 4)  # operations on one sample
    assert count_effort(analysis.model, stats, MEASURED, INPUTS) == 3 * 3 * 24 * 2 / 2 * once
