"""Finds out by trial which layers a model lets be replaced; the others stay dense, and are named with the reason."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rankship_pipeline.evaluate.calibrate import split
from rankship_pipeline.factors.rebuild import swap_chains
from rankship_pipeline.flow.idle import describe_dense
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer, find_dense
from rankship_pipeline.models.watch import watch

# An exporter writes a layer once for every call: a recurrent network over a longer sequence would be a graph that no
# converter finishes.
MOST_CALLS = 256


def keep_dense(prepared: Prepared) -> Prepared:
    """Leave out the layers that cannot be replaced, with a note that names them; InputError if no other is left."""
    inputs = prepared.data.test_inputs
    reasons = find_unreplaceable(prepared.model, prepared.layers, inputs)
    left = tuple(layer for layer in prepared.layers if layer.name not in reasons)
    if not left:
        raise InputError(
            f"no layer of the model can be factored: {'; '.join(describe_dense(reasons))}",
            hint="let its forward call its layers, and hold more than such layers",
        )
    patterns = prepared.recipe.ranks.exclude
    odd = {
        name: reason
        for name, reason in find_dense(prepared.model).items()
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    return replace(prepared, layers=left, notes=(*prepared.notes, *describe_dense(odd | reasons)))


def find_unreplaceable(model: nn.Module, layers: Sequence[Layer], inputs: Inputs) -> dict[str, str]:
    """The reason why a layer cannot be replaced, by name; a layer that may is not listed.

    A layer must be called, as one whose weight is read instead has no Gram and no effect once it is replaced, and the
    model must run and give the same shapes with all others factored at rank 1. All are tried together first; where that
    fails halves are tried, so that few culprits cost few runs.
    """
    reasons = _find_uncalled(model, layers, inputs)
    sample = tuple(tensor[:2] for tensor in inputs)
    with torch.inference_mode():
        wanted = _list_shapes(model(*sample))

    def complain(some: Sequence[Layer]) -> str | None:
        try:
            with torch.inference_mode(), swap_chains(model, {layer.name: Factors(rank=1) for layer in some}):
                found = _list_shapes(model(*sample))
        except Exception as failure:  # noqa: BLE001 - the model's own code raises errors of any type
            return f"the model fails without its weight ({type(failure).__name__})"
        return None if found == wanted else "the model gives another shape without it"

    def keep(known: list[Layer], candidates: list[Layer]) -> list[Layer]:
        """Those of the candidates that may be replaced together with the known; notes the reason of the others."""
        reason = complain([*known, *candidates])
        if reason is None:
            return candidates
        if len(candidates) == 1:
            reasons[candidates[0].name] = reason
            return []
        middle = len(candidates) // 2
        first = keep(known, candidates[:middle])
        return [*first, *keep([*known, *first], candidates[middle:])]

    called = [layer for layer in layers if layer.name not in reasons]
    if called:
        keep([], called)
    return {layer.name: reasons[layer.name] for layer in layers if layer.name in reasons}


def _find_uncalled(model: nn.Module, layers: Sequence[Layer], inputs: Inputs) -> dict[str, str]:
    """The layers that are never called, or too often for a graph; a few samples are enough for most models.

    Of layers tied to each other, one that is called is enough.
    """
    calls = _count_calls(model, layers, tuple(tensor[:1] for tensor in inputs))
    quiet = [layer for layer in layers if not calls[layer.name]]
    if quiet:  # one expert of many may wait for another sample
        calls |= _count_calls(model, quiet, split(inputs)[0])
    return {
        name: "the model never calls it" if not count else f"the model calls it {count} times for one sample"
        for name, count in calls.items()
        if not 0 < count <= MOST_CALLS
    }


def _count_calls(model: nn.Module, layers: Sequence[Layer], inputs: Inputs) -> dict[str, int]:
    calls = {use.name: 0 for layer in layers for use in layer.uses}

    def count(name: str, _x: Tensor, _y: Tensor) -> None:
        calls[name] += 1

    with torch.inference_mode(), watch(model, calls, count):
        model(*inputs)
    return {layer.name: max(calls[use.name] for use in layer.uses) for layer in layers}


def _list_shapes(output: object) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for one in tree_leaves(output) if isinstance(one, Tensor)]
