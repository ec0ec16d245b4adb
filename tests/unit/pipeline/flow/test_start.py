"""What `init` and `compress` write of a language model: its MLPs may lose neurons."""

import json
from pathlib import Path

import pytest

from rankship_pipeline.cli import main
from rankship_pipeline.flow.start import suit_ranks
from rankship_pipeline.recipe.rules import read_recipe


def make_folder(folder: Path, architecture: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return str(folder)


@pytest.mark.parametrize(
    ("architectures", "forms"),
    [
        (["LlamaForCausalLM"], ["svd", "width"]),
        (["LlamaForCausalLM", "Qwen3ForCausalLM"], ["svd", "width"]),
        (["BertForSequenceClassification"], None),
        (["LlamaForCausalLM", "BertForSequenceClassification"], None),
        (["SomethingUnknown"], None),
    ],
)
def test_only_language_models_get_forms_of_their_own(
    tmp_path: Path, architectures: list[str], forms: list[str] | None
) -> None:
    folders = [make_folder(tmp_path / str(place), one) for place, one in enumerate(architectures)]
    assert suit_ranks(folders, ()).get("forms") == forms


def test_what_is_no_folder_here_is_left_to_the_recipes_defaults() -> None:
    assert suit_ranks([None, "org/model"], ("int8",)) == {}
    assert suit_ranks(["org/model"], ("int8", "int4")) == {"step": 32}


@pytest.mark.parametrize(("precision", "step"), [("int8,int4", 32), ("int8", 8)])
def test_ranks_are_those_that_int4_takes_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, step: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("the cat sees the dog\n" * 50)
    folder = make_folder(tmp_path / "writer", "LlamaForCausalLM")
    given = ["--huggingface", folder, "--text", "corpus.txt", "--formats", "onnx", "--precision", precision]
    assert main(["init", "mine", *given]) == 0
    recipe = read_recipe(tmp_path / "mine.toml")
    assert (recipe.ranks.step, recipe.ranks.forms) == (step, ("svd", "width"))
    assert "# ranks are multiples of this" in (tmp_path / "mine.toml").read_text()
