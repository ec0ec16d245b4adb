import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankship_pipeline.align.differences import check_mergeable
from rankship_pipeline.foundation.errors import BuildError, InputError, MergeMismatch
from rankship_pipeline.models.opened import open_source, open_sources
from rankship_pipeline.models.source import load_function, make_module
from rankship_pipeline.models.weights import load_into, read_header, read_state
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source, list_sources

FACTORY = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

def make_wide():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 5))

def make_tied():
    net = make()
    net.append(nn.Linear(3, 4))
    net[3].weight = net[0].weight
    return net

def make_number():
    return 7

def train(model, seed):
    torch.nn.init.constant_(model[0].weight, seed)
    torch.nn.init.uniform_(model[2].weight)

def diverge(model, seed):
    torch.nn.init.constant_(model[2].weight, float("nan"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(FACTORY)
    return tmp_path


def make_source(name: str = "a", factory: str = "net.py:make", **given: str) -> Source:
    return Source(name=name, factory=factory, weights=given.get("weights"), train=given.get("train"))


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_a_saved_state_comes_back(tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 2), "n": torch.tensor([7])}
    save_file(state, tmp_path / "s.safetensors")
    again = read_state(tmp_path / "s.safetensors")
    assert all(torch.equal(again[name], value) for name, value in state.items())
    assert read_header(tmp_path / "s.safetensors") == {"w": ((3, 2), "F32"), "n": ((1,), "I64")}


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, *, as_zip: bool) -> None:
    path = tmp_path / "s.safetensors"
    torch.save(make_net().state_dict(), path, _use_new_zipfile_serialization=as_zip)
    for read in (read_state, read_header):
        with pytest.raises(InputError, match="is a pickle") as caught:
            read(path)
        assert "save_file" in caught.value.hint


@pytest.mark.parametrize("length", [128, 384, 640])
def test_a_header_whose_length_looks_like_a_pickles_first_byte_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "s.safetensors"
    for letters in range(length - 70, length):
        save_file({"w" * letters: torch.ones(1)}, path)
        if int.from_bytes(path.read_bytes()[:8], "little") == length:
            break
    assert path.read_bytes()[0] == 0x80
    assert read_state(path) == {"w" * letters: torch.ones(1)}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_state(path)


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "s.safetensors"
    save_file({"w": torch.randn(30)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    for read in (read_state, read_header):
        with pytest.raises(InputError, match="not a whole safetensors file"):
            read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.safetensors is missing"):
        read_state(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    save_file({"good": torch.ones(2), "bad.weight": torch.tensor([1.0, value])}, tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"NaN or infinity in 1 tensors: bad\.weight\n"):
        read_state(tmp_path / "s.safetensors")


def test_every_difference_to_the_factorys_model_is_told_at_once() -> None:
    state: dict[str, Tensor] = dict(make_net().state_dict())
    del state["0.bias"]
    state["extra.weight"] = torch.ones(1)
    state["2.weight"] = torch.ones(5, 4)
    with pytest.raises(InputError) as caught:
        load_into(make_net(), state, where="a.safetensors")
    message = str(caught.value)
    assert message.startswith("a.safetensors does not fit")
    assert "0.bias: missing" in message
    assert "extra.weight: unexpected" in message
    assert "2.weight: shape [5, 4] instead of [2, 4]" in message


def test_a_fitting_state_is_loaded_into_evaluation_mode() -> None:
    net, other = make_net(), make_net()
    assert not load_into(net, other.state_dict(), where="x").training
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def save_net(folder: Path, name: str, **change: Tensor) -> None:
    save_file({**make_net().state_dict(), **change}, folder / name)


def make_recipe(*sources: Source) -> Recipe:
    return Recipe(name="r", models=sources, data=DataChoice(loader="net.py:load"))


def test_models_of_one_architecture_may_be_merged(folder: Path) -> None:
    save_net(folder, "a.safetensors")
    save_net(folder, "b.safetensors")
    check_mergeable(
        make_recipe(
            make_source("a", weights="a.safetensors"),
            make_source("b", weights="b.safetensors"),
            make_source("c", train="net.py:train"),
        ),
        open_sources(
            list_sources(
                make_recipe(
                    make_source("a", weights="a.safetensors"),
                    make_source("b", weights="b.safetensors"),
                    make_source("c", train="net.py:train"),
                )
            ),
            folder,
            0,
        ),
    )


def test_every_difference_between_models_to_merge_is_told_at_once(folder: Path) -> None:
    save_net(folder, "a.safetensors")
    save_net(folder, "b.safetensors", **{"2.weight": torch.ones(10, 4), "2.bias": torch.ones(10)})
    sources = (
        make_source("a", weights="a.safetensors"),
        make_source("b", weights="b.safetensors"),
        make_source("c", "net.py:make_wide", train="net.py:train"),
    )
    with pytest.raises(MergeMismatch) as caught:
        check_mergeable(make_recipe(*sources), open_sources(list_sources(make_recipe(*sources)), folder, 0))
    message = str(caught.value)
    for line in (
        "b against a: 2.weight: shape [10, 4] instead of [2, 4]",
        "b against a: 2.bias: shape [10] instead of [2]",
        "c against a: 2.weight: shape [5, 4] instead of [2, 4]",
        "c against a: 3.weight: unexpected",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("gone.py:make", "no file"),
        ("net.py", "no file"),
        ("net.py:", "no file"),
        ("net.py:mak", "has no function 'mak'"),
    ],
)
def test_a_wrong_reference_to_a_function_is_named(folder: Path, reference: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        load_function(reference, folder)


def test_an_import_that_fails_inside_a_factory_file_is_told(folder: Path) -> None:
    (folder / "bad.py").write_text("import a_module_that_nobody_has")
    with pytest.raises(InputError, match="a_module_that_nobody_has"):
        load_function("bad.py:make", folder)


def test_a_fault_inside_a_factory_file_is_not_mistaken_for_a_missing_function(folder: Path) -> None:
    (folder / "bad.py").write_text("def make(): ...\n\nmake.colour.shade\n")
    with pytest.raises(AttributeError, match="colour"):
        load_function("bad.py:make", folder)


def test_a_factory_file_may_define_dataclasses_with_postponed_annotations(folder: Path) -> None:
    (folder / "modern.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Sizes:\n    width: int = 3\n\ndef make():\n    return Sizes().width\n"
    )
    assert load_function("modern.py:make", folder)() == 3


def test_a_factory_that_returns_no_module_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="make_number returned a int"):
        open_source(make_source(factory="net.py:make_number", train="net.py:train"), folder, 0).make()


def test_one_seed_gives_one_initialisation(folder: Path) -> None:
    source = make_source(train="net.py:train")
    first, again, other = (open_source(source, folder, seed).make()[0].weight for seed in (1, 1, 2))  # type: ignore[index]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_is_trained_on_the_spot_with_the_recipes_seed(folder: Path) -> None:
    state = open_source(make_source(train="net.py:train"), folder, 5).load_state()
    assert (state["0.weight"] == 5).all()
    again = open_source(make_source(train="net.py:train"), folder, 5).load_state()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_a_training_that_diverges_is_named(folder: Path) -> None:
    with pytest.raises(BuildError, match=r"training 'a' diverged: 2\.weight is not finite"):
        open_source(make_source(train="net.py:diverge"), folder, 0).load_state()


def test_weights_are_loaded_into_the_factorys_model(folder: Path) -> None:
    save_net(folder, "a.safetensors", **{"0.bias": torch.full((4,), 3.0)})
    assert (open_source(make_source(weights="a.safetensors"), folder, 0).load_state()["0.bias"] == 3).all()


@pytest.mark.parametrize("train", ["net.py:train", None])
def test_a_state_with_tied_weights_can_be_saved(folder: Path, train: str | None) -> None:
    made = open_source(make_source(factory="net.py:make_tied", train="net.py:train"), folder, 0).make().state_dict()
    save_file({name: value.clone() for name, value in made.items()}, folder / "t.safetensors")
    source = Source(
        name="a", factory="net.py:make_tied", train=train, weights=None if train is not None else "t.safetensors"
    )
    state = open_source(source, folder, 0).load_state()
    save_file(state, folder / "out.safetensors")
    assert torch.equal(state["0.weight"], state["3.weight"])


def test_a_sources_hash_follows_its_code_and_its_weights(folder: Path) -> None:
    save_net(folder, "a.safetensors")
    source = make_source(weights="a.safetensors")
    first = open_source(source, folder, 0).sha256
    assert open_source(source, folder, 0).sha256 == first
    save_net(folder, "a.safetensors", **{"0.bias": torch.zeros(4)})
    second = open_source(source, folder, 0).sha256
    (folder / "net.py").write_text(FACTORY + "\n")
    assert len({first, second, open_source(source, folder, 0).sha256}) == 3


def test_a_source_file_that_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"model 'a': no file .*gone\.safetensors"):
        assert open_source(make_source(weights="gone.safetensors"), folder, 0).sha256


def test_a_file_that_is_changed_at_once_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytecode of a file of the same size and second would give the old function under the new file's hash."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for answer in (1, 2):
        (tmp_path / "net.py").write_text(f"def make():\n    return {answer}\n")
        os.utime(tmp_path / "net.py", (1_700_000_000, 1_700_000_000))
        assert load_function("net.py:make", tmp_path)() == answer


def test_a_transformers_model_inside_a_factorys_has_the_attention_that_exporters_lower(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import transformers as T\nfrom torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.m = T.BertModel(T.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1,"
        " num_attention_heads=2, intermediate_size=8))\n"
    )
    model: Any = make_module(Source(name="a", factory="net.py:Net"), tmp_path)
    assert model.m.config._attn_implementation == "eager"
