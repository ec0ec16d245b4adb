"""From a model taken apart to a rank plan: the one way through sensitivities, allocators and measuring again."""

from collections.abc import Mapping

import torch
from torch import nn

from rankship_pipeline.factors.analysis import Analysis, gather_stats
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.ranks import ara
from rankship_pipeline.ranks.allocators import (
    Choices,
    LayerStats,
    allocate,
    check_feasible,
    describe_plan,
    keep_to_method,
)
from rankship_pipeline.ranks.price import Price, price_parameters
from rankship_pipeline.ranks.sensitivity import improve, measure_curves
from rankship_pipeline.recipe.choices import RankChoice


def make_plan(
    analysis: Analysis,
    choice: RankChoice,
    fixed: int,
    budget: int,
    inputs: Inputs,
    interference: Mapping[str, float],
    price: Price | None = None,
) -> RankPlan:
    """Choose how every layer is stored; `inputs` are unlabelled calibration samples, the rest as in ranks.allocate.

    Methods that measure take the first `choice.probes` of the inputs; ARA trains on all of them.
    """
    choice = keep_to_method(choice)
    price = price or price_parameters(fixed)
    stats = gather_stats(analysis, choice, interference, price.ask)
    if choice.method in {"ara", "ara-original"}:
        check_feasible([entry.layer for entry in stats], price, budget, choice)
        chosen = _train_ara(analysis, stats, choice, budget - fixed, inputs)
        return describe_plan(stats, chosen, fixed, budget, choice, price)
    probes = tuple(tensor[: choice.probes] for tensor in inputs)
    if choice.sensitivity == "kl":
        stats = measure_curves(analysis, stats, probes)
    plan = allocate(stats, fixed, budget, choice, price)
    if choice.passes == 0:
        return plan
    chosen = {layer.name: layer.factors for layer in plan.layers}
    better = improve(analysis, stats, chosen, budget - price.fixed, choice, probes)
    return describe_plan(stats, better, fixed, budget, choice, price)


def _train_ara(
    analysis: Analysis, stats: tuple[LayerStats, ...], choice: RankChoice, available: int, inputs: Inputs
) -> Choices:
    """ARA on the next tokens of a language model's own calibration text, else on the dense model's predictions."""
    settings = ara.AraChoice(steps=choice.steps, repaired=choice.method == "ara")
    spectra = {entry.layer.name: analysis.layers[entry.layer.name].spectrum for entry in stats}
    kept = available / sum(entry.layer.parameters for entry in stats)
    task = (
        ara.match_next(analysis.model, inputs)
        if _is_language_model(analysis.model, inputs)
        else ara.match_outputs(analysis.model, inputs)
    )
    ratios = ara.train_ratios(analysis.model, spectra, task, kept, settings, 0, lambda _done, _total: None)
    return ara.finalise(ratios, stats, available, repaired=settings.repaired)


@torch.inference_mode()
def _is_language_model(model: nn.Module, inputs: Inputs) -> bool:
    """Tokens in, logits for every position out."""
    output = model(*(tensor[:1] for tensor in inputs))
    return not inputs[0].is_floating_point() and output.ndim > 2  # noqa: PLR2004 - (samples, positions, classes)
