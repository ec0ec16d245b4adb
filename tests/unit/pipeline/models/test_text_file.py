import json
import shutil
from pathlib import Path

import pytest
import torch

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.data import Data, load_data
from rankship_pipeline.models.model_config import complete_recipe
from rankship_pipeline.models.opened import open_sources
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source, list_sources

COLOURS = ["red", "green", "blue"] * 8
TSV = "".join(f"{colour}\ta {colour} thing\n" for colour in COLOURS)
CSV = "id,text,label\n" + "".join(f'{index},"a {one}, thing",{one}\n' for index, one in enumerate(COLOURS))
JSON = "\n".join(json.dumps({"text": f"a {one} thing", "label": index % 3}) for index, one in enumerate(COLOURS))
FIRST = 6  # the token of the first class's name
INPUTS = ("input_ids", "attention_mask")


def load(models: Path, file: Path, written: str, **keys: object) -> Data:
    file.write_text(written, encoding="utf-8")
    return load_written(models, file, **keys)


def load_written(models: Path, file: Path, **keys: object) -> Data:
    sources = (Source(name="m", huggingface="bert"),)
    choice = DataChoice(**{"text": str(file), **keys})  # type: ignore[arg-type]
    return load_recipe(Recipe(name="r", models=sources, data=choice), models)


def load_recipe(recipe: Recipe, models: Path) -> Data:
    whole = complete_recipe(recipe, models)
    return load_data(whole, models, open_sources(list_sources(whole), models, whole.seed))


@pytest.mark.parametrize(("name", "text"), [("t.tsv", TSV), ("t.txt", TSV), ("t.csv", CSV), ("t.jsonl", JSON)])
def test_labelled_texts_become_the_tokenizers_tensors(tiny_models: Path, tmp_path: Path, name: str, text: str) -> None:
    data = load(tiny_models, tmp_path / name, text)
    ids, kinds, mask = data.test_inputs
    assert ids.shape == kinds.shape == mask.shape == (12, 16), "as long as the model takes"
    assert torch.equal(ids[:, 2] - FIRST, data.labels)
    assert torch.equal(mask, (ids != 0).to(torch.int64))
    assert data.answers == "labels"
    assert len(data.calibration["m"][0]) == 12


def test_texts_without_labels_take_the_models_own_answers(tiny_models: Path, tmp_path: Path) -> None:
    data = load(tiny_models, tmp_path / "t.txt", "\n\n".join(f"a {colour} thing" for colour in COLOURS))
    assert data.answers == "predictions"
    assert len(data.labels) == 12


def test_tokens_are_as_many_as_stated(tiny_models: Path, tmp_path: Path) -> None:
    data = load(tiny_models, tmp_path / "t.tsv", TSV, tokens=4)
    assert data.test_inputs[0].shape == (12, 4)
    assert (data.test_inputs[0][:, 3] == 3).all(), "cut, not without its end"
    with pytest.raises(InputError, match=r"data\.tokens is 25, model 'm' takes at most 16"):
        load(tiny_models, tmp_path / "t.tsv", TSV, tokens=25)


def test_a_table_of_texts_may_name_its_columns(tiny_models: Path, tmp_path: Path) -> None:
    text = CSV.replace("id,text,label", "id,sentence,colour")
    data = load(tiny_models, tmp_path / "t.csv", text, columns=("sentence",), label="colour")
    assert torch.equal(data.test_inputs[0][:, 2] - FIRST, data.labels)
    assert torch.equal(
        load(tiny_models, tmp_path / "t.csv", CSV, text=None, csv=str(tmp_path / "t.csv")).labels, data.labels
    )


def test_a_table_may_have_any_ending(tiny_models: Path, tmp_path: Path) -> None:
    expected = load(tiny_models, tmp_path / "t.csv", CSV)
    found = load(tiny_models, tmp_path / "t.dat", CSV, text=None, csv=str(tmp_path / "t.dat"))
    assert torch.equal(found.test_inputs[0], expected.test_inputs[0])
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("t.tsv", f"red\ta{inside}b\n{TSV}") for inside in "\u2028\x85\f\v"),
        *(("t.jsonl", f'{{"text": "a{inside}b", "label": 0}}\n{JSON}') for inside in "\u2028\x85"),
    ],
)
def test_only_a_line_feed_ends_a_text(tiny_models: Path, tmp_path: Path, name: str, text: str) -> None:
    data = load(tiny_models, tmp_path / name, text)
    assert len(data.calibration["m"][0]) + len(data.labels) == len(COLOURS) + 1


def test_lines_may_end_as_on_windows(tiny_models: Path, tmp_path: Path) -> None:
    expected = load(tiny_models, tmp_path / "t.tsv", TSV)
    (tmp_path / "w.tsv").write_bytes(TSV.replace("\n", "\r\n").encode())
    assert torch.equal(load_written(tiny_models, tmp_path / "w.tsv").test_inputs[0], expected.test_inputs[0])


@pytest.mark.parametrize(
    ("name", "text", "keys", "complaint"),
    [
        ("t.txt", "", {}, "no text in"),
        ("t.txt", "red\ta\nb\n", {}, r"line 1 of .* has a tab \(label, tab, text\), line 2 has none"),
        ("t.tsv", TSV, {"label": "colour"}, "has lines, no columns for `label` to name"),
        ("t.tsv", TSV, {"columns": ("text",)}, "has lines, no columns for `columns` to name"),
        ("t.csv", CSV, {"label": "colour"}, "no column 'colour'; it has id, text, label"),
        ("t.csv", CSV, {"columns": ("sentence",)}, "no column 'sentence'"),
        ("t.csv", CSV.replace("text", "sentence"), {}, "which column holds the texts"),
        ("t.csv", CSV + "1,2\n", {}, "line 26: 2 values under 3 names"),
        ("t.csv", "", {}, "is empty"),
        ("t.csv", "a,a\n", {}, "two columns are called 'a'"),
        ("t.jsonl", JSON + "\n{", {}, "line 25"),
        ("t.jsonl", JSON + "\n[1]", {}, "line 25 is no JSON object"),
        ("t.jsonl", JSON + '\n{"text": "a"}', {}, "object 25 has text, the first has text, label"),
        ("t.tsv", TSV.replace("blue\t", "cyan\t"), {}, "the model has no class 'cyan'"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    tiny_models: Path, tmp_path: Path, name: str, text: str, keys: dict[str, object], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        load(tiny_models, tmp_path / name, text, **keys)


def test_a_missing_or_binary_file_is_named(tiny_models: Path, tmp_path: Path) -> None:
    sources = (Source(name="m", huggingface="bert"),)
    recipe = complete_recipe(
        Recipe(name="r", models=sources, data=DataChoice(text=str(tmp_path / "x.txt"))), tiny_models
    )
    with pytest.raises(InputError, match=r"cannot read .*x\.txt"):
        load_recipe(recipe, tiny_models)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match=r"cannot read .*x\.txt"):
        load_recipe(recipe, tiny_models)


def test_unlabelled_texts_cannot_judge_a_merge(tiny_models: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(COLOURS))
    sources = tuple(Source(name=name, huggingface="bert") for name in "ab")
    recipe = Recipe(name="r", models=sources, data=DataChoice(text=str(tmp_path / "t.txt")))
    with pytest.raises(InputError, match="has no labels: the accuracy of a merge of 2 models"):
        load_recipe(recipe, tiny_models)


def test_an_input_that_the_tokenizer_does_not_make_is_named(tiny_models: Path, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text(TSV)
    source = Source(name="m", huggingface="bert", inputs=("input_ids", "position"))
    recipe = Recipe(name="r", models=(source,), data=DataChoice(text=str(tmp_path / "t.tsv")))
    with pytest.raises(InputError, match="its tokenizer makes input_ids, token_type_ids, attention_mask, not position"):
        load_recipe(recipe, tiny_models)


def test_a_model_of_images_takes_no_text(tiny_models: Path, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text(TSV)
    recipe = Recipe(
        name="r", models=(Source(name="m", huggingface="vit"),), data=DataChoice(text=str(tmp_path / "t.tsv"))
    )
    with pytest.raises(InputError, match="model 'm' is for image-classification, which lines of text do not serve"):
        load_recipe(recipe, tiny_models)


def test_a_model_without_a_tokenizer_is_refused_by_name(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "bert", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / "bare" / name).unlink()
    (tmp_path / "t.tsv").write_text(TSV)
    source = Source(name="m", huggingface="bare", task="sequence-classification", inputs=INPUTS)
    with pytest.raises(InputError, match="'m': bare comes without a tokenizer"):
        load_data(
            Recipe(name="r", models=(source,), data=DataChoice(text="t.tsv")),
            tmp_path,
            open_sources(
                list_sources(Recipe(name="r", models=(source,), data=DataChoice(text="t.tsv"))),
                tmp_path,
                Recipe(name="r", models=(source,), data=DataChoice(text="t.tsv")).seed,
            ),
        )
