"""The models of a finished build, as its files compute them, read from the store."""

from collections.abc import Iterator

from torch import nn

from rankship_pipeline.flow.landed_budget import settle_budget
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.rounded import list_precisions, round_model
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.artifact_key import Precision, Variant
from rankship_pipeline.recipe.choices import choose


def list_models(stages: Stages, prepared: Prepared) -> Iterator[tuple[Variant, Precision, nn.Module]]:
    """Yield the dense model, then the compressed one in every precision; what the store lacks is made again."""
    recipe = prepared.recipe
    merged, _ = stages.merge(recipe.merge.method)
    yield "dense", "float32", merged.module
    final, plan = stages.compress(settle_budget(prepared, stages.store), choose(recipe))
    if recipe.refine is not None:
        final, _ = stages.refine(final, plan, recipe.refine)
    for precision in list_precisions(recipe, plan):
        model = final if precision == "float32" else round_model(stages, final, plan, precision).scored
        yield "compressed", precision, model.module
