"""Makes the 8-bit models of a build: what a compressed model becomes once its weights and activations are rounded."""

from dataclasses import replace

from rankship_pipeline.evaluate.calibrate import thin
from rankship_pipeline.export.eight_bits import make_eight_bits
from rankship_pipeline.flow.stages import Model, Stages
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.toolchain import list_versions

_SAMPLES = 128  # of calibration data, for the ranges of activations


def list_precisions(stages: Stages) -> list[Precision]:
    """The precisions of the compressed files, as the recipe lists them."""
    return list(dict.fromkeys(stages.prepared.recipe.precision.weights))


def round_model(stages: Stages, model: Model, plan: RankPlan, precision: Precision) -> Model:
    """The model in a precision: itself in float32; else one whose module computes as the runtimes do, in 8 bits."""
    if precision == "float32":
        return model
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
