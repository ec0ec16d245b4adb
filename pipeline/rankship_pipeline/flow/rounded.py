"""Makes the rounded models of a build: what a compressed one becomes once weights and activations are of fewer bits."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import nn

from rankship_pipeline.evaluate.calibrate import thin
from rankship_pipeline.export.capabilities import list_offered
from rankship_pipeline.export.dynamic import simulate_activations
from rankship_pipeline.export.eight_bits import make_eight_bits, separate
from rankship_pipeline.export.rounded_weight import RoundedWeight, store
from rankship_pipeline.flow.artifacts import Bits
from rankship_pipeline.flow.cached_stage import as_tensors
from rankship_pipeline.flow.stage_model import Model
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.formats import FORMATS
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.toolchain import list_versions
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import get_layer
from rankship_pipeline.models.weights import State, copy_state, load_into
from rankship_pipeline.quantise.grid import BITS, Grid, find_scales, read_integers, read_rows
from rankship_pipeline.quantise.in_order import find_grids, round_layers, round_nearest
from rankship_pipeline.quantise.sizes import Offered
from rankship_pipeline.ranks.call_sites import Branches, Copies
from rankship_pipeline.recipe.choices import Recipe, find_unit
from rankship_pipeline.recipe.precision import BLOCK, Computed

_TENSORS = as_tensors("state.safetensors")
_SAMPLES = 128  # of calibration data, for the ranges of activations


def list_precisions(recipe: Recipe, plan: RankPlan) -> list[Precision]:
    """The precisions of the compressed files: those of the recipe, or the one of a plan that chose every layer's type.

    A plan of several types goes by the one of fewest bits.
    """
    if find_unit(recipe) in {"parameters", "flops"}:
        return list(recipe.precision.weights)
    chosen = set(plan.weights.values())
    return [next((one for one in ("int4", "int8") if one in chosen), "float32")]


def list_rounded(recipe: Recipe, plan: RankPlan) -> list[Precision]:
    """Those precisions of the compressed files that are not float32."""
    return [one for one in list_precisions(recipe, plan) if one != "float32"]


@dataclass(frozen=True)
class Rounded:
    """A model of fewer bits: as it is exported, and as it is scored, computing what its files compute."""

    exported: Model
    scored: Model
    bits: Bits


def round_model(stages: Stages, model: Model, plan: RankPlan, precision: Precision) -> Rounded:
    """A model with weights of fewer bits, whose layers have the types of the plan, or all this precision.

    With static activations its graph computes in 8 bits; else it holds float weights on their grids.
    """
    prepared, computed = stages.prepared, stages.prepared.activations
    chosen = plan.weights if any(one != "float32" for one in plan.weights.values()) else None
    types = chosen or dict.fromkeys(plan.weights, precision)
    inputs = prepared.data.pool_calibration()
    made_from = {
        "model": model.content,
        "types": types,
        "offered": prepared.offered_sha256,
        "data": prepared.calibration_sha256,
        "sources": prepared.source_sha256,
        "likelihood": prepared.likelihood_sha256,
        "batchnorm": prepared.recipe.merge.batchnorm,
    }

    def round_weights() -> State:
        operators = len(find_grids(model.module, types, prepared.offered))
        with stages.steps.track(f"round weights to {precision}", operators) as begin:
            return copy_state(stages.settle(round_layers(model.module, types, inputs, prepared.offered, begin))[0])

    kept = stages.keep(stages.store, "rounded", made_from, _TENSORS, round_weights)
    module = load_into(copy.deepcopy(model.module), kept.value, where=str(kept.entry.folder))
    grids = find_grids(module, types, prepared.offered)
    for line in _list_exceptions(types, grids):
        stages.steps.note(line)
    format_ = next(iter(prepared.recipe.export.formats), FORMATS[0])  # they differ in the last bits
    files = digest([model.files_sha256, prepared.calibration_sha256, list_versions("executorch"), computed, format_])
    rounded = replace(model, module=module, entry=kept.entry, files_sha256=files)
    judging = prepared.court.judging
    names = () if len(judging.outputs) == 1 and judging.bare else judging.outputs
    with stages.steps.step("find the ranges of activations") if computed == "static" else nullcontext():
        exported, bits = _give_bits(module, types, precision, computed, inputs, offered=prepared.offered, outputs=names)
    rounded = scored = replace(rounded, module=exported)
    if computed == "dynamic":
        scored = replace(rounded, module=simulate_activations(module, bits.weights, format_))
    return Rounded(rounded, scored, bits)


def _give_bits(
    module: nn.Module,
    types: Mapping[str, Precision],
    precision: Precision,
    computed: Computed,
    inputs: Inputs,
    *,
    offered: Offered,
    outputs: Sequence[str] = (),
) -> tuple[nn.Module, Bits]:
    """A module with layers of these types, whose weights are on their grids, as it is exported, and its bits.

    With static activations ranges come from some of the `inputs`, and `outputs` names what the module returns.
    """
    if computed == "static":
        floats = [one for one in types if types[one] == "float32"]
        graph = make_eight_bits(module, thin(inputs, _SAMPLES), outputs=outputs, kept=floats)
        return graph, Bits(precision, computed, plain=module)
    grids = find_grids(module, types, offered)
    weights = tuple(one for name, grid in grids.items() for one in _read_weights(module, name, grid))
    return module, Bits(precision, computed, weights)


def round_copies(
    all_copies: Sequence[tuple[Copies, Precision]], computed: Computed, inputs: Inputs
) -> list[tuple[nn.Module, Bits]]:
    """Copies of one site's layer in these types, as they are exported, and their bits.

    They are rounded to the nearest, which is enough to time them, and with static activations quantised together.
    """
    offered = list_offered((), computed)  # every kind of layer: what a format runs is the caller's matter
    found = []
    for copies, precision in all_copies:
        types = {f"layers.{at}": precision for at in range(len(copies.layers))}
        round_nearest(copies, types, offered)
        if computed != "static":
            found.append(_give_bits(copies, types, precision, computed, inputs, offered=offered))
    if computed == "static" and all_copies:
        together = Branches([copies for copies, _ in all_copies])
        names = [str(place) for place in range(len(all_copies))]
        graphs = separate(make_eight_bits(together, inputs, outputs=names))
        pairs = zip(graphs, all_copies, strict=True)
        found = [(graph, Bits(precision, computed, plain=copies)) for graph, (copies, precision) in pairs]
    return found


def _list_exceptions(types: Mapping[str, Precision], grids: Mapping[str, Grid]) -> Iterator[str]:
    """A line for each type that layers could not have, with what they have instead."""
    instead: dict[tuple[Precision, Precision], list[str]] = {}
    for layer, wanted in types.items():
        own = [grid.precision for name, grid in grids.items() if name == layer or name.startswith(f"{layer}.")]
        found: Precision = "float32"
        if own:
            found = max(own, key=lambda one: BITS[one])
        if found != wanted:
            instead.setdefault((wanted, found), []).append(layer)
    for (wanted, found), layers in instead.items():
        line = f"no format of the recipe runs these in {wanted}, they have {found}: {', '.join(layers)}"
        yield f"{line}; int4 takes ranks that are multiples of {BLOCK} ([ranks] step)" if wanted == "int4" else line


def _read_weights(model: nn.Module, name: str, grid: Grid) -> Iterator[RoundedWeight]:
    """An operator's weight as its file stores it, and again for every operator that is tied to it."""
    module = get_layer(model, name)
    rows, own = read_rows(module), (grid.precision, grid.block)
    for other, tied in model.named_modules(remove_duplicate=False):
        if (isinstance(tied, nn.Linear | nn.Embedding) and tied.weight is module.weight) or other == name:
            yield store(other, grid.precision, read_integers(rows, *own), find_scales(rows, *own))
