"""Ranges of lengths in a recipe: as written, as read again, and what they cannot mean."""

from pathlib import Path

import pytest

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.recipe.choices import Recipe
from rankship_pipeline.recipe.export_choices import AxisChoice, ExportChoice
from rankship_pipeline.recipe.rules import read_recipe
from rankship_pipeline.recipe.write import write_recipe

REST = """
[[models]]
name = "a"
factory = "net.py:make"
weights = "a.safetensors"
[data]
loader = "net.py:load"
[budget]
kept_parameters = 0.5
"""
AXIS = '[[export.axes]]\nname = "sequence"\naxis = 1\nrange = [1, 128]\n'


def read(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text('name = "test"\n' + REST + text)
    return read_recipe(path)


def test_ranges_are_read_and_written_again(tmp_path: Path) -> None:
    recipe = read(tmp_path, f"[export]\nbatch = [1, 8]\n{AXIS}")
    axis = AxisChoice(name="sequence", axis=1, range=(1, 128))
    assert recipe.export == ExportChoice(batch=(1, 8), axes=(axis,))
    write_recipe(recipe, tmp_path / "again.toml")
    assert read_recipe(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[export]\nbatch = [8, 1]", "export.batch: a range is two lengths, the smaller first"),
        ("[export]\nbatch = [4, 4]", "export.batch: a range is two lengths"),
        ("[export]\nbatch = [2, 8]", r"export.batch must begin at 1, with which files are timed, got \[2, 8\]"),
        (AXIS.replace("[1,", "[0,"), "export.axes 'sequence': a range is two lengths"),
        (AXIS.replace("axis = 1", "axis = 0"), "axis 0 is export.batch"),
        (AXIS.replace("sequence", "batch"), "'batch' is no name"),
        (AXIS.replace("sequence", "my axis"), "'my axis' is no name"),
        (AXIS + AXIS.replace("128", "64"), "'sequence' has two ranges"),
    ],
)
def test_what_a_range_cannot_mean_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read(tmp_path, text)


def test_one_length_may_lie_at_several_places(tmp_path: Path) -> None:
    recipe = read(tmp_path, AXIS + AXIS.replace("axis = 1", 'axis = 2\ninputs = ["mask"]'))
    assert [axis.axis for axis in recipe.export.axes] == [1, 2]
