"""Merges several trained models of one architecture into one, tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankship_pipeline.evaluate.calibrate import Grams
from rankship_pipeline.foundation import profile
from rankship_pipeline.merge.arithmetic import merge_average, merge_model_stock, merge_slerp, merge_task_arithmetic
from rankship_pipeline.merge.fisher import merge_fisher
from rankship_pipeline.merge.grams import merge_joint, merge_regmean, merge_wudi
from rankship_pipeline.merge.sparse import find_edge, merge_dare, merge_della, merge_ties
from rankship_pipeline.merge.spectral import merge_ctm, merge_iso, merge_knots, merge_tsv
from rankship_pipeline.merge.tensors import MergeInput, seed_generators
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.models.weights import State
from rankship_pipeline.recipe.merge_methods import MergeMethod

# Running statistics are not weights: a scaled task vector could make a variance negative. They are averaged.
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Method:
    """How one tensor is merged; the result of `merge` has the type of the values.

    `by_rows`: a row of the result depends only on that row of the models, so a tensor can be merged piece by piece.
    `survey` first computes one number from the magnitudes (elements,) of each model's whole change (MergeInput.marks).
    """

    merge: Callable[[MergeInput], Tensor]
    by_rows: bool = False
    survey: Callable[[Tensor, Mapping[str, float]], float] | None = None


MERGES: dict[MergeMethod, Method] = {
    "average": Method(merge_average, by_rows=True),
    "slerp": Method(merge_slerp),
    "model-stock": Method(merge_model_stock),
    "task-arithmetic": Method(merge_task_arithmetic, by_rows=True),
    "ties": Method(merge_ties, by_rows=True, survey=find_edge),
    "dare": Method(merge_dare, by_rows=True),
    "della": Method(merge_della, by_rows=True),
    "fisher": Method(merge_fisher),
    "regmean": Method(merge_regmean),
    "joint": Method(merge_joint),
    "sequential": Method(merge_joint),  # the starting point of recover/solve_in_order.py
    "wudi": Method(merge_wudi),
    "tsv-m": Method(merge_tsv),
    "iso-c": Method(merge_iso),
    "knots": Method(merge_knots),
    "ctm": Method(merge_ctm),
}


@dataclass(frozen=True)
class Sources:
    """The models to merge and their data statistics; fields that a method does not need may be left out.

    `base` is the state of the model that all were trained from; `grams` and `fishers` have one entry per model.
    """

    states: Sequence[State]
    layers: Sequence[Layer] = ()
    base: State | None = None
    grams: Sequence[Grams] = ()
    fishers: Sequence[State] = ()


def merge_states(method: MergeMethod, sources: Sources, settings: Mapping[str, float], seed: int = 0) -> State:
    """Every tensor of the merged model, in the first model's types; integers come from the first.

    Computed in float64; the same sources, settings and seed give the same bits.
    """
    layers = {f"{layer.name}.weight": layer for layer in sources.layers}
    merged = {}
    for name, first in sources.states[0].items():
        if not first.is_floating_point():
            merged[name] = first.clone()
            continue
        layer = layers.get(name)
        given = MergeInput(
            values=tuple(state[name].to(torch.float64) for state in sources.states),
            settings=settings,
            base=None if sources.base is None else sources.base[name].to(torch.float64),
            layer=layer,
            grams=() if layer is None else tuple(grams[layer.name] for grams in sources.grams if layer.name in grams),
            fishers=tuple(fisher[name] for fisher in sources.fishers if name in fisher),
            generators=seed_generators(seed, name, len(sources.states)),
        )
        with nullcontext() if layer is None else profile.layer(layer.name):
            merged[name] = merge_tensor(choose_method(method, name), given).to(first.dtype)
    for weight, layer in layers.items():
        merged |= {f"{one.name}.weight": merged[weight] for one in layer.tied}
    return merged


def choose_method(method: MergeMethod, name: str) -> Method:
    """How a tensor of this name is merged: by the method, but batch-norm's running statistics are averaged."""
    return MERGES["average" if name.endswith(_STATISTICS) else method]


def merge_tensor(method: Method, given: MergeInput) -> Tensor:
    """Merge one whole tensor: the survey, then the merge."""
    survey = method.survey
    if survey is not None:
        given = replace(given, marks=tuple(survey(change.abs_().flatten(), given.settings) for change in given.changes))
    return method.merge(given)
