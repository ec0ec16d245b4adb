"""Finds layers that need no factors: their outputs do not depend on the inputs, or nothing depends on their outputs."""

from collections.abc import Mapping
from dataclasses import replace

from rankship_pipeline.export.graph import trace_graph
from rankship_pipeline.export.reach import find_idle_weights
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation.errors import InputError, UnsupportedOp
from rankship_pipeline.models.heads import Headed

_SHOWN = 8  # names of a reason


def keep_idle_dense(prepared: Prepared) -> Prepared:
    """Take the idle layers out of those to factor, with a note on each reason that names them.

    A converter computes a constant layer once and leaves an unused one out, factored or not. UnsupportedOp for a model
    that cannot be traced, if it is to be exported.
    """
    idle = _find_idle(prepared)
    layers = tuple(layer for layer in prepared.layers if layer.name not in idle)
    if not layers:
        raise InputError(
            f"no layer is left to factor: {'; '.join(describe_dense(idle))}",
            hint="give a model whose output its layers make",
        )
    return replace(prepared, layers=layers, notes=(*prepared.notes, *describe_dense(idle)))


def _find_idle(prepared: Prepared) -> dict[str, str]:
    """Why each idle layer is idle, by its name."""
    model, data = prepared.model, prepared.data
    module, prefix = (model.backbone, "backbone.") if isinstance(model, Headed) else (model, "")
    try:
        graph = trace_graph(module, tuple(tensor[:1] for tensor in data.strip(data.test_inputs)))
    except UnsupportedOp:
        if prepared.recipe.export.formats:
            raise
        return {}
    found = find_idle_weights(graph)
    idle = {}
    for layer in prepared.layers:
        weights = [f"{use.name}.weight".removeprefix(prefix) for use in layer.uses]  # a graph reads one of those tied
        if all(weight in found for weight in weights):
            idle[layer.name] = found[weights[0]]
    return idle


def describe_dense(reasons: Mapping[str, str]) -> tuple[str, ...]:
    """A note for each reason why layers stay dense, with their names; `reasons` has it by the layer's name."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return tuple(f"stays dense, as {reason}: {_list_names(names)}" for reason, names in groups.items())


def _list_names(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
