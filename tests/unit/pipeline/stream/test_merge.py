"""Merging from disk to disk: the same numbers as in memory, whatever the pieces, whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankship_pipeline.cli import main
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, MergeMismatch
from rankship_pipeline.merge import Sources, merge_states
from rankship_pipeline.models.lora import read_adapter
from rankship_pipeline.models.sharded import INDEX
from rankship_pipeline.models.tensor_pieces import TYPES, open_pieces, write_header, write_piece
from rankship_pipeline.recipe.choices import MergeChoice
from rankship_pipeline.recipe.merge_file import MergeFile, read_merge_file
from rankship_pipeline.recipe.merge_methods import METHODS, MergeMethod, fill_settings
from rankship_pipeline.stream import merge as stream_merge
from rankship_pipeline.stream.merge import guess_layer, merge_checkpoints

FREE: tuple[MergeMethod, ...] = tuple(name for name in get_args(MergeMethod) if METHODS[name].data == "none")
State = dict[str, Tensor]


def draw(seed: int, dtype: torch.dtype = torch.float32) -> State:
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "embed_tokens.weight": (30, 8),
        "a.weight": (12, 8),
        "a.bias": (12,),
        "conv.weight": (4, 3, 2, 2),
        "norm.running_var": (4,),
        "gain": (),
    }
    state = {name: torch.randn(shape, generator=random).abs().to(dtype) for name, shape in shapes.items()}
    return {**state, "steps": torch.tensor([seed, 2])}


def write(folder: Path, state: State, shards: int = 2, **config: Any) -> Path:  # noqa: ANN401 - what JSON holds
    folder.mkdir()
    names = sorted(state)
    places: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: state[name] for name in names[index::shards]}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names[index::shards], file)
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "dtype": "float32", **config}))
    return folder


def read(folder: Path) -> State:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, draw(seed), shards=1 + seed % 2)
    return tmp_path


def ask(method: MergeMethod, *models: str, **change: Any) -> MergeFile:  # noqa: ANN401 - MergeFile's own keys
    base = "base" if METHODS[method].base else None
    return MergeFile(models=models or ("a", "b"), base=base, merge=MergeChoice(method=method), **change)


def run(asked: MergeFile, folder: Path, to: str = "out") -> State:
    merge_checkpoints(asked, folder, folder / to, Steps(quiet=True))
    return read(folder / to)


@pytest.mark.parametrize("piece", [1 << 20, 17])
@pytest.mark.parametrize("method", FREE)
def test_streamed_in_pieces_of_any_size_it_is_the_merge_in_memory(
    method: MergeMethod, piece: int, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_merge, "PIECE", piece)
    states = [read(models / name) for name in ("a", "b")]
    layers = [layer for name, one in states[0].items() if (layer := guess_layer(name, tuple(one.shape)))]
    sources = Sources(states=states, base=read(models / "base"), layers=layers)
    expected = merge_states(method, sources, fill_settings(method, {}), seed=3)
    found = run(ask(method, seed=3), models)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-6)
    assert found["steps"].tolist() == [1, 2]


@pytest.mark.parametrize("method", ["ties", "dare", "average"])
def test_the_same_file_and_seed_give_the_same_bytes_in_pieces_or_whole(
    method: MergeMethod, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(ask(method), models, "one")
    monkeypatch.setattr(stream_merge, "PIECE", 9)
    run(ask(method), models, "two")
    for path in sorted((models / "one").iterdir()):
        assert path.read_bytes() == (models / "two" / path.name).read_bytes()


def test_the_folder_has_the_first_models_shards_index_and_settings(models: Path) -> None:
    (models / "a" / "tokenizer.json").write_text("{}")
    run(ask("average", dtype="bfloat16"), models)
    out = models / "out"
    assert {path.name for path in out.iterdir()} == {path.name for path in (models / "a").iterdir()} | {
        "rankship-merge.json"
    }
    index = json.loads((out / INDEX).read_text())
    original = json.loads((models / "a" / INDEX).read_text())
    assert index["weight_map"] == original["weight_map"]
    state = read(out)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    assert {value.dtype for value in state.values()} == {torch.bfloat16, torch.int64}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - not a dict


def test_half_precision_is_rounded_once_from_float32(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write(tmp_path / name, draw(seed, torch.bfloat16))
    states = [read(tmp_path / name) for name in ("a", "b")]
    found = run(ask("average"), tmp_path)["a.weight"]
    assert torch.equal(found, ((states[0]["a.weight"].float() + states[1]["a.weight"].float()) / 2).bfloat16())


def test_stopped_anywhere_it_goes_on_at_the_first_missing_shard(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(ask("average"), models, "whole")
    done: list[str] = []
    write_shard = stream_merge.Merging.write_shard

    def stop_at_second(self: stream_merge.Merging, tensors: Any, path: Path) -> None:  # noqa: ANN401
        if done:
            path.write_bytes(b"half a sha")
            raise KeyboardInterrupt
        done.append(path.name)
        write_shard(self, tensors, path)

    monkeypatch.setattr(stream_merge.Merging, "write_shard", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        run(ask("average"), models)
    assert not (models / "out").exists()
    (part,) = models.glob(".out.*.part")
    assert [path.name for path in part.iterdir()] == ["model-00001-of-00002.safetensors"]
    written: list[str] = []

    def note(self: stream_merge.Merging, tensors: Any, path: Path) -> None:  # noqa: ANN401
        written.append(path.name)
        write_shard(self, tensors, path)

    monkeypatch.setattr(stream_merge.Merging, "write_shard", note)
    found = run(ask("average"), models)
    assert len(written) == 1
    assert "00002-of-00002" in written[0]
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert not list(models.glob(".out.*"))


def test_a_changed_model_starts_anew(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankship_pipeline.stream.merge.shutil.copyfile", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(ask("average"), models)
    monkeypatch.undo()
    save_file(draw(9), models / "b" / "model.safetensors")
    found = run(ask("average"), models)
    torch.testing.assert_close(found["a.bias"], (draw(1)["a.bias"] + draw(9)["a.bias"]) / 2)
    assert not list(models.glob(".out.*"))


def test_every_mismatch_is_listed_with_what_to_do(models: Path) -> None:
    state = draw(5)
    state["embed_tokens.weight"] = torch.randn(31, 8)
    state["a.weight"] = torch.ones(12, 8, dtype=torch.int8)
    del state["a.bias"]
    state["extra"] = torch.zeros(2)
    write(models / "other", state, vocab_size=31, id2label={"0": "no"})
    with pytest.raises(MergeMismatch) as failure:
        run(ask("average", "a", "b", "other"), models)
    for words in (
        "a.bias: missing",
        "extra: unexpected",
        "embed_tokens.weight: shape [31, 8] instead of [30, 8]",
        "a.weight: stored as I8 instead of F32",
        "vocab_size is 31 instead of None",
        "id2label.0 is 'no' instead of None",
        "the heads have different classes",
    ):
        assert words in str(failure.value)
    assert not (models / "out").exists()


def test_numbers_that_are_none_and_folders_that_exist_are_refused(models: Path) -> None:
    state = draw(1)
    state["a.bias"][3] = float("nan")
    write(models / "broken", state)
    with pytest.raises(InputError, match=r"the merged tensor a\.bias has NaN"):
        run(ask("average", "a", "broken"), models)
    (models / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        run(ask("average"), models)


def write_adapter(folder: Path, seed: int) -> None:
    """Rank 2 on a linear layer, a convolution and the embedding, and a bias trained with them."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "a.lora_A.weight": (2, 8),
        "a.lora_B.weight": (12, 2),
        "conv.lora_A.weight": (2, 3, 2, 2),
        "conv.lora_B.weight": (4, 2, 1, 1),
        "embed_tokens.lora_embedding_A": (2, 30),
        "embed_tokens.lora_embedding_B": (8, 2),
        "a.bias": (12,),
    }
    folder.mkdir()
    tensors = {f"base_model.model.{name}": torch.randn(shape, generator=random) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "bias": "all", "r": 2, "lora_alpha": 3})
    )


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ctm"])
def test_adapters_stream_as_the_models_that_they_make(
    method: MergeMethod, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_merge, "PIECE", 20)
    for seed, name in enumerate(("one", "two")):
        write_adapter(models / name, seed)
    base = read(models / "base")
    for name in ("one", "two"):
        write(models / f"whole-{name}", read_adapter(models / name).add_to(base))
    asked = replace(ask(method, "one", "two"), base="base")
    streamed = run(asked, models, "streamed")
    whole = run(ask(method, "whole-one", "whole-two"), models, "whole")
    for name, value in whole.items():
        torch.testing.assert_close(streamed[name], value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(streamed["a.weight"], base["a.weight"], atol=0.1)
    with pytest.raises(InputError, match="is an adapter and needs its base model"):
        run(replace(asked, base=None), models)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('models = ["a", "b"]\n[merge]\nmethod = "joint"', "'joint' needs data"),
        ('models = ["a", "b"]\n[merge]\nmethod = "ties"', "needs the base"),
        ('models = ["a", "b"]\nbase = "base"', "does not use base"),
        ('models = ["a", "b", "c"]\n[merge]\nmethod = "slerp"', "two models, got 3"),
        ("models = []", "models is empty"),
        ('models = ["a"]\n[merge]\nbatchnorm = "keep"\nmethod = "average"', "belong to recipes"),
        ('models = ["a"]\ndtype = "int8"', "dtype"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "merge.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_merge_file(path)


def test_the_verb_merges_relative_to_its_file(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = 'models = ["a", "b"]\nbase = "base"\n[merge]\nmethod = "ties"\ndensity = 0.5\n'
    (models / "merge.toml").write_text(text)
    assert main(["merge", str(models / "merge.toml"), "--to", str(models / "out")]) == 0
    assert capfd.readouterr().out == f"{models / 'out'}\n"
    assert read(models / "out").keys() == draw(0).keys()
    assert main(["merge", str(models / "merge.toml"), "--to", str(models / "out")]) == 2


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_that_is_cut_short_or_gone_is_refused_by_name(models: Path, keep: int) -> None:
    path = models / "b" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"b/model\.safetensors is not a whole safetensors file"):
        run(ask("average"), models)
    path.unlink()
    with pytest.raises(InputError, match=r"b has no \*\.safetensors"):
        run(ask("average"), models)
    (models / "a" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"00001-of-00002\.safetensors is missing"):
        run(ask("average"), models)


@pytest.mark.parametrize("dtype", TYPES.values())
def test_tensors_of_every_type_are_read_by_rows_and_written_as_the_library_does(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {
        "matrix": (torch.arange(24).reshape(6, 4) % 7).to(dtype),
        "number": torch.tensor(1).to(dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
    }
    path, mine = tmp_path / "theirs.safetensors", tmp_path / "mine.safetensors"
    save_file(tensors, path)
    header = open_pieces(path)
    assert torch.equal(header["matrix"].read(2, 5), tensors["matrix"][2:5])
    with mine.open("wb") as stream:
        write_header(stream, {name: (dtype, tuple(one.shape)) for name, one in tensors.items()})
        for name in tensors:
            write_piece(stream, header[name].read())
    loaded = load_file(mine)
    for name, one in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(header[name].read(), one)
        assert torch.equal(loaded[name], one)
