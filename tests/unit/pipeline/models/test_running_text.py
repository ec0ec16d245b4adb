from pathlib import Path

import pytest
import torch

from make.writers import save_writer, write_text
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.data import Data, load_data
from rankship_pipeline.models.model_config import complete_recipe
from rankship_pipeline.models.opened import open_sources
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writers")
    save_writer(folder / "writer")
    return folder


def load(models: Path, file: Path, **keys: object) -> Data:
    choice = DataChoice(text=str(file), **keys)  # type: ignore[arg-type]
    recipe = complete_recipe(Recipe(name="r", models=(Source(name="m", huggingface="writer"),), data=choice), models)
    assert recipe.models[0].task == "causal-lm"
    return load_data(recipe, models, open_sources(recipe.models, models, 0))


def test_a_text_becomes_windows_with_the_token_after_every_position(models: Path, tmp_path: Path) -> None:
    data = load(models, write_text(tmp_path / "t.txt"), tokens=16)
    (inputs,), labels = data.test_inputs, data.labels
    assert inputs.shape == labels.shape == (30, 16)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert len(data.calibration["m"][0]) == 30
    both = torch.cat([inputs, data.calibration["m"][0]])
    assert len({tuple(row) for row in both.tolist()}) == 60, "no window is in both"
    starts = both[:, 0]
    assert int((starts == 0).sum()) == 1, "the text begins once"


def test_of_a_long_text_the_beginning_counts(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "t.txt")
    monkeypatch.setattr("rankship_pipeline.models.running_text._CHARACTERS", len(text.read_text()) // 2)
    monkeypatch.setattr("rankship_pipeline.models.running_text._CHARACTERS_OF_A_TOKEN", 1)
    data = load(models, text, tokens=16)
    assert len(data.test_inputs[0]) == 15, "half of the windows"


def test_the_window_is_as_long_as_the_model_takes(models: Path, tmp_path: Path) -> None:
    assert load(models, write_text(tmp_path / "t.txt", 400)).test_inputs[0].shape[1] == 48
    with pytest.raises(InputError, match=r"data\.tokens is 49, model 'm' takes at most 48"):
        load(models, tmp_path / "t.txt", tokens=49)


def test_texts_of_a_table_follow_each_other_and_are_ended(models: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\n" + "the cat sees a dog .\n" * 60)
    data = load(models, tmp_path / "t.csv", tokens=7)
    for row in torch.cat([data.test_inputs[0], data.calibration["m"][0]]):
        assert int((row < 2).sum()) == 1 + int(row[0] == 0 and row[6] == 1), "six words and an end, or the beginning"


def test_too_little_text_is_said(models: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat")
    with pytest.raises(InputError, match="has 3 tokens, a window takes 49"):
        load(models, tmp_path / "t.txt")


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    save_writer(tmp_path / "writer", vocab_size=12)
    with pytest.raises(InputError, match="the tokenizer of m makes tokens up to 17, the model knows 12"):
        load(tmp_path, write_text(tmp_path / "t.txt"))
