import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from make.berts import save_bert
from rankship_pipeline.align.differences import check_mergeable
from rankship_pipeline.foundation.errors import InputError, MergeMismatch
from rankship_pipeline.models.huggingface import ByPosition, find_snapshot, list_snapshot_files, resolve_config
from rankship_pipeline.models.opened import open_source, open_sources
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source, list_sources


def make_source(name: str) -> Source:
    return Source(
        name=name,
        huggingface=name,
        task="sequence-classification",
        inputs=("input_ids", "attention_mask"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate(("first", "second")):
        save_bert(root / name, seed)
    save_bert(root / "other", 3, num_labels=5)
    return root


def test_a_wrapped_model_gives_transformers_own_logits(folder: Path) -> None:
    source = make_source("first")
    model = open_source(source, folder, 0).make()
    model.load_state_dict(open_source(source, folder, 0).load_state())
    ids = torch.randint(0, 20, (4, 6))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    reference = transformers.BertForSequenceClassification.from_pretrained(folder / "first").eval()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, mask), reference(input_ids=ids, attention_mask=mask).logits)
    assert isinstance(model, ByPosition)


def test_inputs_are_taken_in_the_order_of_the_recipe(folder: Path) -> None:
    model = open_source(make_source("first"), folder, 0).make()
    assert isinstance(model, ByPosition)
    swapped = ByPosition(model.model, ("attention_mask", "input_ids")).eval()
    ids, mask = torch.randint(2, 20, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    with torch.inference_mode():
        assert torch.equal(swapped(mask, ids), model(ids, mask))
    with pytest.raises(ValueError, match="zip"):
        model(ids)


def test_two_models_of_one_configuration_may_be_merged(folder: Path) -> None:
    sources = make_source("first"), make_source("second")
    check_mergeable(
        Recipe(name="r", models=sources, data=DataChoice(loader="x.py:x")),
        open_sources(list_sources(Recipe(name="r", models=sources, data=DataChoice(loader="x.py:x"))), folder, 0),
    )
    states = [open_source(source, folder, 0).load_state() for source in sources]
    assert states[0].keys() == states[1].keys()
    name = "model.classifier.weight"
    assert not torch.equal(states[0][name], states[1][name])


def test_models_with_different_classes_are_a_mismatch(folder: Path) -> None:
    sources = make_source("first"), make_source("other")
    with pytest.raises(MergeMismatch, match=r"classifier\.weight: shape \[5, 8\] instead of \[3, 8\]"):
        check_mergeable(
            Recipe(name="r", models=sources, data=DataChoice(loader="x.py:x")),
            open_sources(list_sources(Recipe(name="r", models=sources, data=DataChoice(loader="x.py:x"))), folder, 0),
        )


def test_the_files_of_a_model_are_its_configuration_and_weights(folder: Path) -> None:
    files = list_snapshot_files(find_snapshot(make_source("first"), folder))
    assert [path.name for path in files] == [
        "config.json",
        "model.safetensors",
    ]
    assert open_source(make_source("first"), folder, 0).sha256 != open_source(make_source("second"), folder, 0).sha256


def test_an_absolute_path_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    source = make_source(str(folder / "first"))
    assert list_snapshot_files(find_snapshot(source, tmp_path))[0] == folder / "first/config.json"


@pytest.mark.parametrize("file", ["model.safetensors", "weights.safetensors"])
def test_a_wrappers_prefix_and_a_file_of_another_name_load_alike(folder: Path, tmp_path: Path, file: str) -> None:
    save_bert(tmp_path / "first", 0)
    state = load_file(tmp_path / "first/model.safetensors")
    (tmp_path / "first/model.safetensors").unlink()
    save_file({f"module.{name}": value for name, value in state.items()}, tmp_path / "first" / file)
    found, wanted = (open_source(make_source("first"), where, 0).load_state() for where in (tmp_path, folder))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_stale_file_beside_the_model_changes_nothing(folder: Path, tmp_path: Path) -> None:
    save_bert(tmp_path / "first", 0)
    stale = {name: value + 9 for name, value in load_file(tmp_path / "first/model.safetensors").items()}
    save_file(stale, tmp_path / "first/model_backup.safetensors")
    opened, wanted = open_source(make_source("first"), tmp_path, 0), open_source(make_source("first"), folder, 0)
    assert [path.name for path in opened.files] == ["config.json", "model.safetensors"]
    assert "model_backup.safetensors not read" in opened.remarks[0]
    assert torch.equal(opened.load_state()["model.classifier.bias"], wanted.load_state()["model.classifier.bias"])


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path / "m", 0)
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/pytorch_model.bin")
    with pytest.raises(InputError, match=r"has no \*\.safetensors"):
        list_snapshot_files(find_snapshot(make_source("m"), tmp_path))


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path / "m", 0)
    (tmp_path / "m/config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        list_snapshot_files(find_snapshot(make_source("m"), tmp_path))


def test_nan_in_the_weights_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path / "m", 0)
    state = load_file(tmp_path / "m/model.safetensors")
    state["classifier.bias"][0] = float("nan")
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"NaN or infinity .*classifier\.bias"):
        open_source(make_source("m"), tmp_path, 0).load_state()


def test_a_checkpoint_without_its_head_is_refused_not_filled_at_random(tmp_path: Path) -> None:
    save_bert(tmp_path / "m", 0)
    state = load_file(tmp_path / "m/model.safetensors")
    del state["classifier.weight"], state["classifier.bias"]
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"classifier\.bias.*classifier\.weight"):
        open_source(make_source("m"), tmp_path, 0).load_state()


@pytest.mark.parametrize("name", ["nobody/no-such-model", "not a/valid/id"])
def test_an_unknown_id_without_a_network_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read once, at import
    with pytest.raises(InputError, match=f"{name!r} is neither a folder nor a hub id"):
        list_snapshot_files(find_snapshot(make_source(name), tmp_path))


def test_code_that_comes_with_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}, "architectures": ["OwnForX"]}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/own.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(InputError, match="no configuration that transformers knows by itself"):
        resolve_config(tmp_path / "m")


def test_a_compressed_folder_says_how_to_export_it(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder / "first", copied)
    record = {"plan": {"layers": [{"name": "a", "factors": None}]}, "family": "transformers"}
    (copied / "rankship.json").write_text(json.dumps(record))
    assert list_snapshot_files(copied)  # dense
    record["plan"]["layers"][0]["factors"] = {"form": "svd", "rank": 3}  # type: ignore[index]
    (copied / "rankship.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="holds a compressed model") as caught:
        list_snapshot_files(copied)
    assert "rankship.load" in str(caught.value.hint)
