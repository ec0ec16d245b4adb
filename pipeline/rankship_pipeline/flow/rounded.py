"""Makes the rounded models of a build: what a compressed one becomes once weights and activations are of fewer bits."""

import copy
from dataclasses import replace

from rankship_pipeline.evaluate.calibrate import thin
from rankship_pipeline.export.eight_bits import make_eight_bits
from rankship_pipeline.flow.cached_stage import as_tensors
from rankship_pipeline.flow.stages import Model, Stages
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.toolchain import list_versions
from rankship_pipeline.models.weights import State, copy_state, load_into
from rankship_pipeline.quantise.in_order import round_layers
from rankship_pipeline.recipe.choices import Recipe, find_unit

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


def round_model(stages: Stages, model: Model, plan: RankPlan, precision: Precision) -> Model:
    """A model whose module computes as the runtimes do, in 8 bits.

    Layers have the types of the plan, or this precision where the plan is one of ranks alone.
    """
    prepared = stages.prepared
    chosen = plan.weights if any(one != "float32" for one in plan.weights.values()) else None
    types = chosen or dict.fromkeys(plan.weights, precision)
    inputs = prepared.data.pool_calibration()
    made_from = {"model": model.content, "types": types, "data": prepared.calibration_sha256}

    def round_weights() -> State:
        return copy_state(stages.settle(round_layers(model.module, types, inputs))[0])

    title = f"round weights to {precision}"
    kept = stages.keep(stages.store, "rounded", made_from, _TENSORS, round_weights, steps=stages.steps, title=title)
    module = load_into(copy.deepcopy(model.module), kept.value, where=str(kept.entry.folder))
    judging = prepared.court.judging
    names = () if len(judging.outputs) == 1 and judging.bare else judging.outputs
    samples = thin(inputs, _SAMPLES)
    with stages.steps.step("find the ranges of activations"):
        module = make_eight_bits(module, samples, outputs=names, kept=[one for one in types if types[one] == "float32"])
    files = [model.files_sha256, prepared.calibration_sha256, list_versions("executorch")]
    return replace(model, module=module, entry=kept.entry, files_sha256=digest(files))
