"""Builds a recipe: its stages in order, then one file per variant and format, in the store."""

from pathlib import Path

from rankship_pipeline.evaluate.quality_gate import refuse_lost
from rankship_pipeline.flow.artifacts import Shipped, export_variants
from rankship_pipeline.flow.foresight import foresee
from rankship_pipeline.flow.landed_budget import find_landing, is_landed, settle_budget
from rankship_pipeline.flow.preflight import finish_checks
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.flow.rounded import list_precisions, round_model
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.landing import Landing
from rankship_pipeline.foundation.records import Alternative, Build
from rankship_pipeline.foundation.store import Entry, Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.ranks.losses import list_doubts
from rankship_pipeline.recipe.choices import Comparison, choose

_RECORD = "build.json"


def build_recipe(prepared: Prepared, store: Store, steps: Steps) -> tuple[Build, Entry]:
    """Make the recipe's build, or read it if it is finished; resumes at the first missing stage.

    A finished build with deleted artifacts is made again.
    """
    made_from = _ingredients(*find_landing(prepared, store))
    found = store.find("build", made_from)
    if found is not None and not _is_whole(read_build(found), store):
        steps.note("artifacts of the finished build are missing; making them again")
        store.discard(found)
        found = None
    if found is None:
        checked = prepared if prepared.checked else finish_checks(prepared)
        budgeted = settle_budget(checked, store)
        foresee(budgeted, store, steps)
        made = _make_build(budgeted, store, steps)

        def write(target: Path) -> None:
            (target / _RECORD).write_text(encode(made), encoding="utf-8")

        found = store.produce("build", made_from, write)
    return read_build(found), found


def is_built(prepared: Prepared, store: Store) -> bool:
    """Whether the recipe's build is finished, with all its files."""
    if not is_landed(prepared, store):
        return False
    found = store.find("build", _ingredients(*find_landing(prepared, store)))
    return found is not None and _is_whole(read_build(found), store)


def find_build(prepared: Prepared, store: Store) -> tuple[Build, Entry]:
    """The finished build of a recipe; InputError if there is none."""
    found = store.find("build", _ingredients(*find_landing(prepared, store)))
    if found is None:
        raise InputError(f"{prepared.recipe.name} is not built yet", hint="run `rankship build` with the same recipe")
    return read_build(found), found


def read_build(entry: Entry) -> Build:
    """The record of a finished build."""
    return decode(Build, entry.read(_RECORD).read_bytes(), where=str(entry.folder))


def _is_whole(build: Build, store: Store) -> bool:
    return all(store.holds(artifact.file) for artifact in build.files)


def _ingredients(prepared: Prepared, landing: Landing | None) -> dict[str, object]:
    formats = prepared.recipe.export.formats
    return {
        "recipe": prepared.recipe_sha256,
        "sources": prepared.source_sha256,
        "data": [prepared.calibration_sha256, prepared.test_sha256, prepared.unlabelled_sha256, prepared.tests_sha256],
        "answers": prepared.data.answers,
        "landing": None if landing is None else digest(landing),
        "code": hash_code(),
        "versions": {name: list_versions(name) for name in formats},
        **prepared.generating_sha256,
    }


def _make_build(budgeted: Budgeted, store: Store, steps: Steps) -> Build:
    prepared = budgeted.prepared
    recipe, stages = prepared.recipe, Stages(prepared, store, steps)
    scores = Scores(stages)
    sources = scores.evaluate_sources()
    merged, interference = stages.merge(recipe.merge.method)
    fidelities = scores.judge(merged, "merged")
    refuse_lost(fidelities, recipe.quality, "max_merge_loss_points", interference)
    compressed, plan = stages.compress(budgeted, choose(recipe))
    for doubt in list_doubts(plan):
        steps.note(doubt)
    fidelities += scores.judge(compressed, "compressed")
    accuracies = [*sources, *scores.evaluate(merged, "merged"), *scores.evaluate(compressed, "compressed")]
    final, refinement = compressed, None
    if recipe.refine is not None:
        final, refinement = stages.refine(compressed, plan, recipe.refine)
        fidelities += scores.judge(final, "refined")
        accuracies += scores.evaluate(final, "refined")
    costs = {layer.name: layer.relative_error + (layer.interference or 0) for layer in plan.layers}
    refuse_lost(fidelities[-len(recipe.models) :], recipe.quality, "max_loss_points", costs)
    shipped: list[Shipped] = [("dense", merged, None, None)]
    for precision in list_precisions(recipe, plan):
        if precision == "float32":
            shipped.append(("compressed", final, plan, None))
            continue
        rounded = round_model(stages, final, plan, precision)
        found = scores.judge(rounded.scored, precision)
        refuse_lost(found, recipe.quality, "max_loss_points", costs)
        fidelities += found
        accuracies += scores.evaluate(rounded.scored, precision)
        shipped.append(("compressed", rounded.exported, plan, rounded.bits))
    files = export_variants(prepared, store, steps, shipped)
    return Build(
        recipe=recipe.name,
        recipe_sha256=prepared.recipe_sha256,
        plan=plan,
        accuracies=tuple(accuracies),
        alternatives=tuple(_evaluate_alternative(scores, budgeted, comparison) for comparison in recipe.compare),
        artifacts=tuple(one for one in files if one.key.task is None and not one.key.shape),
        heads=tuple(one for one in files if one.key.task is not None and not one.key.shape),
        shapes=tuple(one for one in files if one.key.shape),
        dense_parameters=prepared.dense_parameters,
        batchnorm_reestimated=tuple(
            stage for stage, model in (("merged", merged), ("compressed", compressed)) if model.batchnorm_reestimated
        ),
        fidelities=fidelities,
        mended=prepared.notes,
        refinement=refinement,
        landing=budgeted.landing,
        answers=prepared.data.answers,
    )


def _evaluate_alternative(scores: Scores, budgeted: Budgeted, comparison: Comparison) -> Alternative:
    model, plan = scores.stages.compress(budgeted, comparison)
    if set(plan.weights.values()) - {"float32"}:
        (precision,) = list_precisions(budgeted.prepared.recipe, plan)
        model = round_model(scores.stages, model, plan, precision).scored
    (accuracy,) = scores.evaluate(model, f"alternative:{comparison.name}")
    return Alternative(method=comparison.name, plan=plan, accuracy=accuracy)
