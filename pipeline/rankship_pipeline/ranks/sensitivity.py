"""Measures each layer's sensitivity: the divergence of the model's predictions when that layer is changed."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.likelihood import Likelihood
from rankship_pipeline.factors.analysis import Analysis
from rankship_pipeline.factors.forms import Candidate, approximate
from rankship_pipeline.foundation import profile
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import get_layer, shape_weight
from rankship_pipeline.models.outputs import Outputs
from rankship_pipeline.ranks.allocators import allocate_knapsack, total_cost
from rankship_pipeline.ranks.stats import Choices, Curve, LayerStats
from rankship_pipeline.recipe.choices import RankChoice

# Sizes (share of the dense parameters) at which every layer is measured; between them damage is log-linear. The
# smallest candidate is always measured: beyond the last measured point the curve is flat, and error would look free.
PROBED_SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75)
_LEAST = 1e-9  # nats: damages below are noise of float32

Tick = Callable[[], None]


def measure_curves(
    analysis: Analysis,
    stats: Sequence[LayerStats],
    inputs: Inputs,
    tick: Tick = lambda: None,
    likelihood: Likelihood | None = None,
) -> tuple[LayerStats, ...]:
    """Every layer's damage curve, each layer changed alone, on unlabelled inputs."""
    model = copy.deepcopy(analysis.model)
    teacher = predict(model, inputs)
    measured = []
    for entry in stats:
        with profile.layer(entry.layer.name), _restoring(model, entry.layer.name):
            points = []
            for candidate in _pick_probes(entry.candidates, entry.dense_cost):
                _write(model, analysis, entry.layer.name, candidate)
                points.append((candidate.error, measure_divergence(model, inputs, teacher, likelihood)))
        measured.append(replace(entry, curve=_draw_curve(points)))
        tick()
    return tuple(measured)


def improve(  # noqa: PLR0913, PLR0917 - a plan, and what it is measured by
    analysis: Analysis,
    stats: Sequence[LayerStats],
    chosen: Choices,
    available: int,
    choice: RankChoice,
    inputs: Inputs,
    tick: Tick = lambda: None,
    likelihood: Likelihood | None = None,
) -> Choices:
    """Measure around a plan and solve again, `choice.passes` times; keeps the plan with the smallest divergence.

    Curves of layers changed alone ignore how errors of several layers add up. Here each layer is measured
    with all others as planned: its damage is the divergence minus the divergence with that layer dense.
    """
    teacher = predict(analysis.model, inputs)
    best, least = chosen, _measure_plan(analysis, stats, chosen, inputs, teacher, likelihood)
    current = chosen
    for _ in range(choice.passes):
        model = _apply_plan(analysis, stats, current)
        around = []
        for entry in stats:
            name = entry.layer.name
            with profile.layer(name), _restoring(model, name):
                _write(model, analysis, name, None)
                base = measure_divergence(model, inputs, teacher, likelihood)
                points = []
                for candidate in _pick_probes(entry.candidates, entry.dense_cost):
                    _write(model, analysis, name, candidate)
                    damage = measure_divergence(model, inputs, teacher, likelihood) - base
                    points.append((candidate.error, damage))
            around.append(replace(entry, curve=_draw_curve(points)))
            tick()
        current = allocate_knapsack(around, available, choice)
        found = _measure_plan(analysis, stats, current, inputs, teacher, likelihood)
        if found < least and total_cost(stats, current) <= available:
            best, least = current, found
    return best


def _pick_probes(candidates: Sequence[Candidate], dense: int) -> list[Candidate]:
    """The candidates nearest to PROBED_SHARES, by rising error."""
    if not candidates:
        return []

    def find_nearest(size: float) -> Candidate:
        return min(candidates, key=lambda one: abs(one.cost - size))

    picked = {find_nearest(share * dense) for share in PROBED_SHARES}
    return sorted(picked, key=lambda one: one.error)


def _draw_curve(points: Sequence[tuple[float, float]]) -> Curve:
    """The curve through points of rising error, made monotone: less damage at more error is noise."""
    errors: list[float] = []
    damages: list[float] = []
    worst = _LEAST
    for error, damage in points:
        if error <= 0 or (errors and error <= errors[-1]):
            continue
        worst = max(worst, damage)
        errors.append(error)
        damages.append(worst)
    return Curve(errors=tuple(errors), damages=tuple(damages))


def _measure_plan(
    analysis: Analysis,
    stats: Sequence[LayerStats],
    chosen: Choices,
    inputs: Inputs,
    teacher: Outputs,
    likelihood: Likelihood | None,
) -> float:
    return measure_divergence(_apply_plan(analysis, stats, chosen), inputs, teacher, likelihood)


def _apply_plan(analysis: Analysis, stats: Sequence[LayerStats], chosen: Choices) -> nn.Module:
    """The model in its dense structure, every planned layer's weight replaced by the product of its factors."""
    model = copy.deepcopy(analysis.model)
    for entry in stats:
        factors = chosen[entry.layer.name]
        if factors is not None:
            _write(model, analysis, entry.layer.name, Candidate(factors, 0, 0.0))
    return model


@torch.no_grad()
def _write(model: nn.Module, analysis: Analysis, name: str, candidate: Candidate | None) -> None:
    taken = analysis.layers[name]
    matrix = taken.widen(taken.weight if candidate is None else approximate(taken, candidate.factors))
    weight = get_layer(model, name).weight
    weight.copy_(shape_weight(matrix, weight, taken.layer))


@contextmanager
def _restoring(model: nn.Module, name: str) -> Iterator[None]:
    weight = get_layer(model, name).weight
    saved = weight.detach().clone()
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(saved)
