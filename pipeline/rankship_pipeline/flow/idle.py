"""Finds layers that need no factors: their outputs do not depend on the inputs, or nothing depends on their outputs."""

from collections.abc import Mapping
from dataclasses import replace

from torch.export import ExportedProgram

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
    graph = _trace(prepared)
    idle = {} if graph is None else _find_idle(prepared, graph)
    layers = tuple(layer for layer in prepared.layers if layer.name not in idle)
    if not layers:
        raise InputError(
            f"no layer is left to factor: {'; '.join(describe_dense(idle))}",
            hint="give a model whose output its layers make",
        )
    operators = None if graph is None else len(graph.graph.nodes)
    pace = prepared.pace and replace(prepared.pace, operators=operators)
    return replace(prepared, layers=layers, pace=pace, notes=(*prepared.notes, *describe_dense(idle)))


def _trace(prepared: Prepared) -> ExportedProgram | None:
    """The model's graph, that of its backbone if it has heads; None where it has none and needs none."""
    model, data = prepared.model, prepared.data
    module = model.backbone if isinstance(model, Headed) else model
    try:
        return trace_graph(module, tuple(tensor[:1] for tensor in data.strip(data.test_inputs)))
    except UnsupportedOp:
        if prepared.recipe.export.formats:
            raise
        return None


def _find_idle(prepared: Prepared, graph: ExportedProgram) -> dict[str, str]:
    """Why each idle layer is idle, by its name."""
    prefix = "backbone." if isinstance(prepared.model, Headed) else ""
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
