"""Makes the rounded models of a build: what a compressed one becomes once weights and activations are of fewer bits."""

from dataclasses import replace

from rankship_pipeline.evaluate.calibrate import thin
from rankship_pipeline.export.eight_bits import make_eight_bits
from rankship_pipeline.flow.stages import Model, Stages
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.toolchain import list_versions
from rankship_pipeline.recipe.choices import Recipe, find_unit

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
    """A model whose module computes as the runtimes do, in 8 bits."""
    prepared = stages.prepared
    judging = prepared.court.judging
    names = () if len(judging.outputs) == 1 and judging.bare else judging.outputs
    samples = thin(prepared.data.pool_calibration(), _SAMPLES)
    kept = [name for name, own in plan.weights.items() if own == "float32"]
    kept = kept if len(kept) < len(plan.weights) else []  # a plan of ranks alone says nothing of types
    with stages.steps.step(f"round to {precision}"):
        module = make_eight_bits(model.module, samples, outputs=names, kept=kept)
    made_from = [model.files_sha256, precision, prepared.calibration_sha256, list_versions("executorch")]
    return replace(model, module=module, files_sha256=digest(made_from))
