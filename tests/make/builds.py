"""Plans and builds without any layer."""

from dataclasses import replace
from typing import Any

from rankship_pipeline.foundation.records import Artifact, Build, LayerRank, RankPlan


def make_plan(*layers: LayerRank, parameters: int = 1, **changes: Any) -> RankPlan:  # noqa: ANN401 - any field
    """A plan of these layers whose every total is `parameters`."""
    plan = RankPlan(
        method="uniform",
        layers=layers,
        fixed_parameters=parameters,
        total_parameters=parameters,
        unit="parameters",
        total_cost=parameters,
        budget_cost=parameters,
        predicted_error=0.0,
    )
    return replace(plan, **changes)


def make_build(*artifacts: Artifact, recipe: str = "r", parameters: int = 1) -> Build:
    """A build of these artifacts by a recipe that compresses nothing."""
    return Build(
        recipe=recipe,
        recipe_sha256="r",
        artifacts=artifacts,
        plan=make_plan(parameters=parameters),
        accuracies=(),
        alternatives=(),
        dense_parameters=parameters,
    )
