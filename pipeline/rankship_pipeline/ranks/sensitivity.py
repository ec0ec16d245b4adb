"""Measures each layer's sensitivity: the divergence of the model's predictions when that layer is changed.

Passes begin at the changed layer (see probing.py). Three sizes are measured of every layer, more of it where its curve
leaves the second-order estimate's shape; samples are doubled until either half of them asks for an equally good plan.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import log

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.lead import measure_lead
from rankship_pipeline.evaluate.likelihood import Likelihood
from rankship_pipeline.factors.analysis import Analysis
from rankship_pipeline.foundation.records import Stored
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import Outputs
from rankship_pipeline.ranks.allocators import ALLOCATORS, Allocator, allocate_knapsack, total_cost
from rankship_pipeline.ranks.probing import Changes, Ratings, prepare_prober, write
from rankship_pipeline.ranks.stats import Choices, Curve, LayerStats, Offer
from rankship_pipeline.recipe.choices import RankChoice

# Sizes (share of the dense parameters) at which every layer is measured; between them damage is log-linear. The
# smallest candidate is always measured: beyond the last measured point the curve is flat, and error would look free.
PROBED_SHARES = (0.0, 0.35, 0.75)
# Sizes that are measured where damage is not about proportional to the error between the neighbours above.
FURTHER_SHARES = (0.15, 0.5)
_SLOPES = (0.8, 1.25)  # of damage over error in logarithms; the second-order estimate's is 1
_FIRST = 8  # samples of the first round
_HALVES = (slice(0, None, 2), slice(1, None, 2))
# The plan that either half of the samples asks for may lose this much more than that of all, by the curves of all.
_REGRET = 0.01
_LEAST = 1e-9  # nats: damages below are noise of float32

IsSure = Callable[[Sequence[LayerStats], Sequence[Sequence[LayerStats]]], bool]


def measure_curves(
    analysis: Analysis,
    stats: Sequence[LayerStats],
    inputs: Inputs,
    likelihood: Likelihood | None = None,
    is_sure: IsSure | None = None,
) -> tuple[LayerStats, ...]:
    """Every layer's damage curve, each layer changed alone, on unlabelled inputs.

    With `is_sure`, on as few of them as it takes; it is given the stats by all samples so far and those by each half.
    """
    return _measure(copy.deepcopy(analysis.model), analysis, stats, inputs, likelihood, is_sure, around=False)


def compare_plans(allocate: Allocator, available: int, choice: RankChoice) -> IsSure:
    """Whether the samples suffice: plans from either half of them are as good as that from all, by the curves of all.

    Samples are the same for all layers, so that what only makes samples hard cancels out.
    """

    def is_sure(whole: Sequence[LayerStats], halves: Sequence[Sequence[LayerStats]]) -> bool:
        plans = [allocate(some, available, choice) for some in (whole, *halves)]
        own, *others = (
            sum(entry.predict_damage(entry.predict_error(plan[entry.layer.name]), "kl") for entry in whole)
            for plan in plans
        )
        return max(others) <= (1 + _REGRET) * own

    return is_sure


def improve(
    analysis: Analysis,
    stats: Sequence[LayerStats],
    chosen: Choices,
    available: int,
    choice: RankChoice,
    inputs: Inputs,
    likelihood: Likelihood | None = None,
) -> Choices:
    """Measure around a plan and solve again, `choice.passes` times; keeps the plan with the smallest divergence.

    Curves of layers changed alone ignore how errors of several layers add up. Here each layer is measured
    with all others as planned: its damage is the divergence minus the divergence with that layer dense.
    """
    teacher = predict(analysis.model, inputs)
    best, least = chosen, _measure_plan(analysis, stats, chosen, inputs, teacher, likelihood)
    current = chosen
    is_sure = compare_plans(allocate_knapsack, available, choice)
    for _ in range(choice.passes):
        model = _apply_plan(analysis, stats, current)
        around = _measure(model, analysis, stats, inputs, likelihood, is_sure, around=True)
        current = allocate_knapsack(around, available, choice)
        found = _measure_plan(analysis, stats, current, inputs, teacher, likelihood)
        if found < least and total_cost(stats, current) <= available:
            best, least = current, found
    return best


def _measure(
    model: nn.Module,
    analysis: Analysis,
    stats: Sequence[LayerStats],
    inputs: Inputs,
    likelihood: Likelihood | None,
    is_sure: IsSure | None,
    *,
    around: bool,
) -> tuple[LayerStats, ...]:
    """The stats with the curves of the layers of `model`, which is changed meanwhile.

    `around` a plan, damage counts from the layer's being dense.
    """
    total = len(inputs[0])
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))  # samples may come sorted
    names = [entry.layer.name for entry in stats]
    prober = prepare_prober(model, analysis, names, tuple(tensor[order] for tensor in inputs), likelihood)
    taken = min(_FIRST, total) if is_sure else total
    base: list[Offer | None] = [None] if around else []
    changes: dict[str, list[Offer | None]] = {
        entry.layer.name: [*base, *_pick_probes(entry, PROBED_SHARES)] for entry in stats if entry.ranked
    }
    ratings = prober.rate(_list_ways(changes), slice(taken))
    further = {entry.layer.name: _pick_further(entry) for entry in _draw(stats, changes, ratings, around=around)}
    ratings = ratings.add_changes(prober.rate(_list_ways(further), slice(taken)))
    changes = {name: [*probed, *further[name]] for name, probed in changes.items()}
    while True:
        whole, *halves = (_draw(stats, changes, ratings, some, around=around) for some in (slice(None), *_HALVES))
        if taken == total or is_sure is None or is_sure(whole, halves):
            return whole
        ratings = ratings.add_samples(prober.rate(_list_ways(changes), slice(taken, 2 * taken)))
        taken = min(2 * taken, total)


def _list_ways(changes: Mapping[str, Sequence[Offer | None]]) -> Changes:
    """The ways to measure; None is dense in float32."""
    return {name: [one.stored if one else Stored() for one in some] for name, some in changes.items()}


def _pick_probes(entry: LayerStats, shares: Sequence[float]) -> list[Offer]:
    """What `ranked` has nearest to these shares of the dense size, by rising error."""
    sizes = [share * entry.find_cost(Stored()) for share in shares]
    picked = {min(entry.ranked, key=lambda one: abs(one.cost - size)) for size in sizes}
    return sorted(picked, key=lambda one: one.error)


def _pick_further(entry: LayerStats) -> list[Offer]:
    """The candidates between measured points whose damage is not about proportional to their error."""
    curve = entry.curve or Curve(errors=(), damages=())
    points = list(zip(curve.errors, curve.damages, strict=True))
    bent = [
        (low, high)
        for (low, less), (high, more) in pairwise(points)
        if not _SLOPES[0] <= log(more / less) / log(high / low) <= _SLOPES[1]
    ]
    further = _pick_probes(entry, FURTHER_SHARES) if bent else []
    return [one for one in further if any(low < one.error < high for low, high in bent)]


def _draw(
    stats: Sequence[LayerStats],
    changes: Mapping[str, Sequence[Offer | None]],
    ratings: Ratings,
    samples: slice = slice(None),
    *,
    around: bool,
) -> tuple[LayerStats, ...]:
    """The stats with the curves that these samples give."""
    drawn = []
    for entry in stats:
        name, points = entry.layer.name, list[tuple[float, float]]()
        if name in changes:
            damages = ratings.average(name, samples).tolist()
            base = damages[0] if around else 0.0
            found = zip(changes[name], damages, strict=True)
            points = sorted((one.error, damage - base) for one, damage in found if one is not None)
        drawn.append(replace(entry, curve=_draw_curve(points)))
    return tuple(drawn)


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


def try_sensitivities(
    analysis: Analysis,
    stats: Sequence[LayerStats],
    choice: RankChoice,
    available: int,
    inputs: Inputs,
    likelihood: Likelihood | None,
) -> RankChoice:
    """The choice with the sensitivity, relative or second-order, whose plan diverges less from the dense model.

    Relative errors suit convolutions, and the second order suits transformers. It is relative where there is no
    curvature, and with batch-norm: its statistics are settled after, so that what is measured before misleads.
    Samples are taken until they tell the plans apart, or all if they do not.
    """
    choices = [replace(choice, sensitivity=one) for one in ("relative", "gradient")]
    settled = any(isinstance(one, _BatchNorm) for one in analysis.model.modules())
    if settled or any(entry.nats is None for entry in stats):
        return choices[0]
    plans = [ALLOCATORS[choice.method](stats, available, one) for one in choices]
    if plans[0] == plans[1]:
        return choices[0]
    first, second = (_apply_plan(analysis, stats, plan) for plan in plans)
    return choices[0 if measure_lead(first, second, [(analysis.model, inputs)], likelihood) <= 0 else 1]


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
    """The model in its dense structure, every planned layer's weight replaced by what its operators compute."""
    model = copy.deepcopy(analysis.model)
    for entry in stats:
        stored = chosen[entry.layer.name]
        if stored != Stored():
            write(model, analysis, entry.layer.name, stored)
    return model
