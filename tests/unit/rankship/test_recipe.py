from dataclasses import replace
from pathlib import Path

import pytest

import rankship as rs
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.recipe.rules import read_recipe
from rankship_pipeline.recipe.write import write_recipe

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "pipeline/recipes").glob("*.toml"))
RECIPE = rs.Recipe(
    name="mine",
    models=(rs.Source(name="a", factory="net.py:Net", weights="a.safetensors"),),
    data=rs.DataChoice(loader="net.py:load"),
    budget=rs.Budget(kept_parameters=0.4),
)
VARIED = replace(
    RECIPE,
    models=(
        *RECIPE.models,
        rs.Source(name='b "quoted" ü', huggingface="b", task="image-classification", inputs=("x",)),
    ),
    merge=rs.MergeChoice(method="ties", density=0.3, base=rs.Source(name="start", factory="n.py:N", weights="s")),
    ranks=rs.RankChoice(method="strs", exclude=("head*", "a.b")),
    compare=(rs.Comparison(name="plain", merge="average", ranks="arp", whitening="plain"),),
    refine=rs.RefineChoice(steps=3),
    export=rs.ExportChoice(formats=("onnx",)),
    seed=7,
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_is_written_reads_as_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = rs.Recipe.read(path)
    assert rs.Recipe.read(recipe.write(tmp_path / "again.toml")) == recipe


@pytest.mark.parametrize("recipe", [RECIPE, VARIED], ids=["plain", "varied"])
def test_every_table_is_written(recipe: rs.Recipe, tmp_path: Path) -> None:
    path = recipe.write(tmp_path / "mine.toml")
    assert rs.Recipe.read(path) == recipe
    assert rs.Recipe.take(read_recipe(path)) == recipe, "the command reads it alike"


def test_defaults_are_left_out(tmp_path: Path) -> None:
    text = RECIPE.write(tmp_path / "mine.toml").read_text()
    assert "[ranks]" not in text
    assert "None" not in text
    assert text.count("=") == 6


def test_a_recipe_that_cannot_be_meant_is_neither_written_nor_run(tmp_path: Path) -> None:
    wrong = replace(RECIPE, budget=rs.Budget(kept_parameters=4))
    with pytest.raises(InputError, match="kept_parameters is the fraction kept"):
        wrong.write(tmp_path / "mine.toml")
    assert not (tmp_path / "mine.toml").exists()
    with pytest.raises(InputError, match="kept_parameters is the fraction kept"):
        rs.run(wrong)


def test_lists_serve_as_tuples_and_wrong_types_are_named() -> None:
    listed = replace(RECIPE, models=list(RECIPE.models))  # type: ignore[arg-type]
    assert listed.check() == RECIPE
    with pytest.raises(InputError, match=r"budget\.kept_parameters: .*got 'half'"):
        replace(RECIPE, budget=rs.Budget(kept_parameters="half")).check()  # type: ignore[arg-type]


def test_a_file_cannot_say_that_a_session_holds_its_models(tmp_path: Path) -> None:
    held = replace(RECIPE, models=(rs.Source(name="a", held=True),), data=rs.DataChoice(held=True))
    with pytest.raises(InputError, match="`held` is for models and data of a Python session") as caught:
        held.write(tmp_path / "mine.toml")
    assert "to_recipe(FOLDER)" in caught.value.hint
    assert not (tmp_path / "mine.toml").exists()
    write_recipe(held, tmp_path / "mine.toml")
    with pytest.raises(InputError, match="`held` is for models and data of a Python session"):
        rs.Recipe.read(tmp_path / "mine.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe at .*gone\.toml"):
        rs.run(tmp_path / "gone.toml")
