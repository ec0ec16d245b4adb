"""Makes a rank plan for a decomposed model: sensitivities, allocation, and measuring around the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from rankship_pipeline.evaluate.calibrate import fit_outputs
from rankship_pipeline.evaluate.likelihood import Likelihood
from rankship_pipeline.factors.analysis import Analysis
from rankship_pipeline.factors.decompose import Spectrum
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import count_parameters, list_operators
from rankship_pipeline.foundation.records import LayerRank, RankPlan, Stored
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import call
from rankship_pipeline.models.token_table import find_token_table
from rankship_pipeline.ranks import ara
from rankship_pipeline.ranks.allocators import ALLOCATORS, total_cost
from rankship_pipeline.ranks.budget import check_feasible, keep_to_method
from rankship_pipeline.ranks.effort import Say, choose_sensitivity
from rankship_pipeline.ranks.price import Price, price_parameters
from rankship_pipeline.ranks.sensitivity import compare_plans, improve, measure_curves, try_sensitivities
from rankship_pipeline.ranks.stats import Choices, LayerStats, gather_stats
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.recipe.rank_methods import RANK_METHODS

_OUTPUT_BYTES = 2**30  # of the dense model's outputs on all samples that are measured on


def make_plan(  # noqa: PLR0913, PLR0917 - what a plan depends on
    analysis: Analysis,
    choice: RankChoice,
    fixed: int,
    budget: int,
    inputs: Inputs,
    interference: Mapping[str, float],
    price: Price | None = None,
    likelihood: Likelihood | None = None,
    say: Say = lambda _line: None,
) -> RankPlan:
    """Choose how every layer is stored; `inputs` are unlabelled calibration samples, the rest as in `allocate`.

    The `likelihood` says how the model's outputs are distributed (None: all hold logits); `say` tells the user a line.

    Methods that measure take the first `choice.probes` of the inputs; ARA trains on all of them.
    """
    choice = keep_to_method(choice)
    price = price or price_parameters(fixed)
    stats = gather_stats(analysis, choice, interference, price)
    if RANK_METHODS[choice.method].reads == "model":
        check_feasible([entry.layer for entry in stats], price, budget, choice)
        chosen = _train_ara(analysis, stats, choice, budget - fixed, inputs, likelihood)
        return describe_plan(stats, chosen, fixed, budget, choice, price)
    probes = _pick_probes(analysis.model, inputs, choice.probes)
    if choice.threshold is None:
        check_feasible([entry.layer for entry in stats], price, budget, choice)
    choice = choose_sensitivity(analysis.model, stats, choice, probes, say)
    if choice.sensitivity == "auto":
        choice = try_sensitivities(analysis, stats, choice, budget - price.fixed, probes, likelihood)
    if choice.sensitivity == "kl":
        is_sure = compare_plans(ALLOCATORS[choice.method], budget - price.fixed, choice)
        stats = measure_curves(analysis, stats, probes, likelihood, is_sure)
    plan = allocate(stats, fixed, budget, choice, price)
    if choice.passes == 0:
        return plan
    chosen = {layer.name: layer.stored for layer in plan.layers}
    better = improve(analysis, stats, chosen, budget - price.fixed, choice, probes, likelihood=likelihood)
    return describe_plan(stats, better, fixed, budget, choice, price)


def _train_ara(
    analysis: Analysis,
    stats: tuple[LayerStats, ...],
    choice: RankChoice,
    available: int,
    inputs: Inputs,
    likelihood: Likelihood | None,
) -> Choices:
    """Train ARA: a language model on the calibration text's next tokens, others on the dense model's predictions."""
    settings = ara.AraChoice(steps=choice.steps, repaired=choice.method == "ara")
    spectra = {entry.layer.name: _restore(analysis.layers[entry.layer.name]) for entry in stats}
    kept = available / sum(entry.layer.parameters for entry in stats)
    task = (
        ara.match_next(analysis.model, inputs)
        if is_language_model(analysis.model, inputs)
        else ara.match_outputs(analysis.model, inputs, likelihood)
    )
    ratios = ara.train_ratios(analysis.model, spectra, task, kept, settings, 0, lambda _done, _total: None)
    return ara.finalise(ratios, stats, available, repaired=settings.repaired)


def _restore(taken: Decomposition) -> Spectrum:
    """The spectrum of the layer's own weight."""
    found = taken.spectrum
    return replace(found, U=taken.restore_outputs(found.U), right=taken.restore_inputs(found.right))


@torch.inference_mode()
def _pick_probes(model: nn.Module, inputs: Inputs, most: int) -> Inputs:
    """The first samples, as many as are to be measured on and their outputs have place for in memory."""
    count = fit_outputs(call(model, tuple(tensor[:1] for tensor in inputs)), most, _OUTPUT_BYTES)
    return tuple(tensor[:count] for tensor in inputs)


@torch.inference_mode()
def is_language_model(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the model maps tokens to scores of the next one: over its whole vocabulary, by what stands before.

    A classifier of tokens has fewer classes than words; in a masked model a later token changes earlier outputs.
    """
    read = find_token_table(model, inputs)
    tokens, words = inputs[0][:1], 0 if read is None else read[1].num_embeddings
    output = next(iter(call(model, (tokens, *(tensor[:1] for tensor in inputs[1:]))).values()))
    if not words or tokens.ndim != 2 or output.shape[1:] != (tokens.shape[1], words):  # noqa: PLR2004
        return False
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % words
    after = next(iter(call(model, (changed, *(tensor[:1] for tensor in inputs[1:]))).values()))
    return torch.allclose(output[:, :-1], after[:, :-1], rtol=1e-4, atol=1e-5)


def allocate(
    stats: Sequence[LayerStats], fixed_parameters: int, budget: int, choice: RankChoice, price: Price | None = None
) -> RankPlan:
    """Choose how every layer is stored by `choice.method`; the plan's cost never exceeds the budget.

    `fixed_parameters` are those outside the factorable layers. The budget is in the unit of the `price` that the
    `stats` were made with; None: parameters. With ARP's fixed threshold the given budget is ignored.
    """
    price = price or price_parameters(fixed_parameters)
    if choice.threshold is None:
        check_feasible([entry.layer for entry in stats], price, budget, choice)
    chosen = ALLOCATORS[choice.method](stats, budget - price.fixed, choice)
    return describe_plan(stats, chosen, fixed_parameters, budget, choice, price)


def describe_plan(
    stats: Sequence[LayerStats],
    chosen: Choices,
    fixed_parameters: int,
    budget: int,
    choice: RankChoice,
    price: Price,
) -> RankPlan:
    """The rank plan of a choice for every layer."""
    layers = tuple(_describe(entry, chosen[entry.layer.name]) for entry in stats)
    total = price.fixed + total_cost(stats, chosen)
    return RankPlan(
        method=choice.method,
        layers=layers,
        fixed_parameters=fixed_parameters,
        total_parameters=fixed_parameters + sum(layer.chosen_parameters for layer in layers),
        unit=price.unit,
        total_cost=total,
        budget_cost=budget if choice.threshold is None else total,
        predicted_error=sum(layer.relative_error for layer in layers),
    )


def _describe(stats: LayerStats, stored: Stored) -> LayerRank:
    layer, factors = stats.layer, stored.factors
    return LayerRank(
        name=layer.name,
        rows=layer.rows,
        columns=layer.columns,
        factors=factors,
        operators=tuple(one.shape for one in list_operators(layer, factors)),
        dense_parameters=layer.parameters,
        chosen_parameters=count_parameters(layer, factors),
        relative_error=stats.predict_error(stored),
        interference=stats.interference,
        weights=stored.weights,
    )
