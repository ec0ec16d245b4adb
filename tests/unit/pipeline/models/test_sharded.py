"""Which files of a folder are a checkpoint: those that transformers reads, and never a tensor from two of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.sharded import (
    INDEX,
    copy_settings,
    describe_ignored,
    list_weight_files,
    name_shards,
    open_checkpoint,
)


def save(folder: Path, file: str, *names: str, value: float = 1.0) -> None:
    save_file({name: torch.full((2,), value) for name in names}, folder / file)


def save_index(folder: Path, file: str = INDEX, **places: str) -> None:
    (folder / file).write_text(json.dumps({"weight_map": places}))


def test_a_stale_file_beside_the_model_is_not_read_and_said(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "a", "b")
    save(tmp_path, "model_backup.safetensors", "a", "b", value=9)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [1, 1]
    assert [path.name for path in checkpoint.ignored] == ["model_backup.safetensors"]
    said = describe_ignored(checkpoint)
    assert said is not None
    assert "model_backup.safetensors not read" in said
    assert said.endswith("goes by model.safetensors")


def test_stale_shards_beside_an_index_are_not_read(tmp_path: Path) -> None:
    shards = name_shards(2)
    for value, names in ((1.0, shards), (9.0, name_shards(3)), (9.0, ["consolidated.safetensors"])):
        for file, tensor in zip(names, "abc", strict=False):
            save(tmp_path, file, tensor, value=value)
    save_index(tmp_path, a=shards[0], b=shards[1])
    checkpoint = open_checkpoint(tmp_path)
    assert [checkpoint.read(name).tolist() for name in "ab"] == [[1, 1], [1, 1]]
    assert len(checkpoint.ignored) == 4
    assert [path.name for path in list_weight_files(tmp_path)] == [INDEX, *shards]


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "a")
    save(tmp_path, "model-00001-of-00001.safetensors", "a", value=9)
    save_index(tmp_path, a="model-00001-of-00001.safetensors")
    assert open_checkpoint(tmp_path).read("a").tolist() == [1, 1]


def test_the_file_that_a_configuration_states_goes_before_all(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "a")
    save(tmp_path, "own.safetensors", "a", value=9)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "own.safetensors"}))
    assert open_checkpoint(tmp_path).read("a").tolist() == [9, 9]
    (tmp_path / "new").mkdir()
    copy_settings(tmp_path, tmp_path / "new")
    assert json.loads((tmp_path / "new/config.json").read_text()) == {}
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "../own.safetensors"}))
    with pytest.raises(InputError, match="outside the folder"):
        open_checkpoint(tmp_path)


def test_files_of_no_known_name_are_read_together_unless_they_share_a_tensor(tmp_path: Path) -> None:
    save(tmp_path, "one.safetensors", "a")
    save(tmp_path, "two.safetensors", "b")
    assert open_checkpoint(tmp_path).places.keys() == {"a", "b"}
    save(tmp_path, "three.safetensors", "c", "b")
    with pytest.raises(InputError, match=r"1 tensors .* such as b in three\.safetensors and two\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_of_one_index_is_refused(tmp_path: Path) -> None:
    shards = name_shards(2)
    save(tmp_path, shards[0], "a")
    save(tmp_path, shards[1], "a", "b")
    save_index(tmp_path, a=shards[0], b=shards[1])
    with pytest.raises(InputError, match=r"such as a in model-00001-of-00002\.safetensors and model-00002"):
        open_checkpoint(tmp_path)


def test_without_an_index_a_whole_set_of_shards_is_the_model(tmp_path: Path) -> None:
    for file, name in zip(name_shards(2), "ab", strict=True):
        save(tmp_path, file, name)
    save(tmp_path, "consolidated.safetensors", "z", value=9)
    assert open_checkpoint(tmp_path).places.keys() == {"a", "b"}
    (tmp_path / name_shards(2)[0]).unlink()
    with pytest.raises(InputError, match="holds 1 of the 2 shards of model, and no index"):
        open_checkpoint(tmp_path)


def test_an_index_of_any_name_is_followed(tmp_path: Path) -> None:
    save(tmp_path, "x-1.safetensors", "a")
    save(tmp_path, "x-2.safetensors", "b")
    index = "own.safetensors.index.json"
    save_index(tmp_path, index, a="x-1.safetensors", b="x-2.safetensors")
    for given in (tmp_path, tmp_path / index):
        assert open_checkpoint(given).places.keys() == {"a", "b"}
    save_index(tmp_path, index, a="x-1.safetensors", b="x-1.safetensors")
    with pytest.raises(InputError, match=r"x-1\.safetensors lacks tensor b"):
        open_checkpoint(tmp_path)


def test_a_folder_of_pickles_is_refused_with_a_command(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="only pickles") as caught:
        open_checkpoint(tmp_path)
    assert "python -c" in caught.value.hint
    assert "model.safetensors" in caught.value.hint


def test_no_index_of_other_files_is_copied(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for name in (INDEX, "pytorch_model.bin.index.json", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    copy_settings(tmp_path, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", "tokenizer.json"}
