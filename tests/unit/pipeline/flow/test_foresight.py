"""What is said before a build: of the stages that are not in the store, and an error where memory will not do."""

from dataclasses import replace
from pathlib import Path

import pytest

from make.recipes import write_untrained_recipe
from rankship_pipeline.flow import foresight
from rankship_pipeline.flow.budget import price_recipe
from rankship_pipeline.flow.build import build_recipe
from rankship_pipeline.flow.estimate import estimate
from rankship_pipeline.flow.foresight import describe_work, find_finished, foresee
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.prepared import Budgeted
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.profile import record_stages
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import Recipe
from rankship_pipeline.recipe.rules import read_recipe

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose stages take seconds, shared, as are the stages' results."""
    found = tmp_path_factory.mktemp("recipe")
    write_untrained_recipe(found, "a")
    return found


def settle(folder: Path, **tables: object) -> Budgeted:
    recipe: Recipe = read_recipe(folder / "tiny.toml")
    return price_recipe(prepare(replace(recipe, **tables), folder))  # type: ignore[arg-type]  # a recipe's tables


def test_a_build_that_cannot_fit_is_refused_before_any_stage_with_the_settings_that_help(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "find_free_bytes", lambda: 0)
    store, steps = Store(folder / "refused"), Steps(quiet=True)
    with pytest.raises(InputError, match=r"of memory and 0\.0 kB are free") as caught:
        build_recipe(settle(folder).prepared, store, steps)
    assert not list(store.root.glob("*"))
    assert caught.value.hint.startswith("build it on a machine with"), "nothing helps where nothing is free"
    assert list(steps.seconds) == []


def test_the_layer_that_needs_most_memory_is_the_one_to_keep_dense(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgeted = settle(folder)
    first, *others = budgeted.prepared.layers
    wide = replace(budgeted.prepared, layers=(replace(first, columns=12_000, only_factored=False), *others))
    monkeypatch.setattr(foresight, "find_free_bytes", lambda: 500 * MEGABYTE)
    with pytest.raises(InputError, match=first.name) as caught:
        foresee(replace(budgeted, prepared=wide), Store(folder / "refused"), Steps(quiet=True))
    assert f'keep the widest layers dense: exclude = ["{first.name}"] in [ranks]' in caught.value.hint
    assert "curvature" not in caught.value.hint, "it would not help"


def test_what_is_in_the_store_is_not_counted_and_every_stage_is_foreseen(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, budgeted = Store(folder / "store"), settle(folder)
    assert find_finished(budgeted, store) == frozenset()
    with record_stages() as recording:
        build_recipe(budgeted.prepared, store, Steps())
    taken = {one.name for one in recording.list_stages()}
    assert taken == {one.name for one in estimate(describe_work(budgeted.prepared))}
    assert all(one.estimated_seconds is not None for one in recording.list_stages())
    said = capsys.readouterr().err
    assert "of memory to build; most time: " in said
    assert "without the time to train a" in said

    other = settle(folder, budget=Budget(kept_parameters=0.6))
    before = {"train a", "calibrate a", "nothing to merge", "weigh outputs by their effect on predictions"}
    assert find_finished(other, store) == before
    foresee(other, store, Steps())
    assert "train a" not in capsys.readouterr().err
