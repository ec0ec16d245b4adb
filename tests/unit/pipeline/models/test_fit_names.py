"""A file's names fit a module's with and without wrappers, and what is not trained may be missing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.constants import is_constant
from rankship_pipeline.models.fit_names import fit_names
from rankship_pipeline.models.opened import OpenedSource, open_sources
from rankship_pipeline.models.sharded import INDEX, name_shards
from rankship_pipeline.models.weights import State, TensorHeader, describe_tensor
from rankship_pipeline.recipe.choices import Source

FACTORY = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

def make_half():
    return make().to(torch.bfloat16)
"""


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def rename(change: Callable[[str], str]) -> State:
    return {change(name): tensor for name, tensor in make().state_dict().items()}


def describe(state: State) -> dict[str, TensorHeader]:
    return {name: describe_tensor(tensor) for name, tensor in state.items()}


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "none": (lambda name: name, ""),
    "DDP": (lambda name: f"module.{name}", "module"),
    "compile": (lambda name: f"_orig_mod.{name}", "_orig_mod"),
    "both": (lambda name: f"module._orig_mod.{name}", "_orig_mod, module"),
    "inside": (lambda name: name.replace("0.", "0._orig_mod."), "_orig_mod"),
    "model": (lambda name: f"model.{name}", "the prefix 'model.'"),
    "deep": (lambda name: f"module.net.backbone.{name}", "the prefix 'net.backbone.'"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_prefixes_are_left_out_and_said(kind: str) -> None:
    change, words = WRAPPED[kind]
    fit = fit_names(make(), describe(rename(change)), where="a")
    assert fit.names == {name: change(name) for name in make().state_dict()}
    assert bool(fit.remarks) == bool(words)
    assert words in "".join(fit.remarks)


def test_a_file_of_what_the_factory_wraps_fits_too() -> None:
    outer = nn.Module()
    outer.model = make()
    fit = fit_names(outer, describe(make().state_dict()), where="a")
    assert fit.names["model.0.weight"] == "0.weight"
    assert "'model.' was put before" in fit.remarks[0]


@pytest.mark.parametrize("change", [lambda name: f"ema.{name}" if name[0] == "0" else name, lambda name: f"x{name}"])
def test_names_that_do_not_fit_as_a_whole_are_refused(change: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match=r"0\.weight: missing"):
        fit_names(make(), describe(rename(change)), where="a")


def test_a_counter_may_be_missing_and_a_table_extra() -> None:
    state = make().state_dict()
    del state["1.num_batches_tracked"]
    state["rotary_emb.inv_freq"] = torch.ones(2)
    fit = fit_names(make(), describe(state), where="a")
    assert fit.names.keys() == make().state_dict().keys() - {"1.num_batches_tracked"}
    assert "num_batches_tracked missing" in fit.remarks[0]
    assert "inv_freq not used" in fit.remarks[0]


@pytest.mark.parametrize(
    ("name", "shape", "constant"),
    [
        ("bn1.num_batches_tracked", (), True),
        ("bert.embeddings.position_ids", (1, 512), True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (16,), True),
        ("transformer.h.0.attn.bias", (1, 1, 64, 64), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 64, 64), True),
        ("transformer.h.0.attn.masked_bias", (), True),
        ("blocks.0.attn.bias", (64,), False),
        ("blocks.0.attn.bias", (4, 64, 64), False),
        ("h.0.attn.c_attn.bias", (192,), False),
        ("embeddings.position_embeddings.weight", (512, 64), False),
        ("bn1.running_mean", (8,), False),
    ],
)
def test_constants_are_told_from_what_is_trained(name: str, shape: tuple[int, ...], *, constant: bool) -> None:
    assert is_constant(name, TensorHeader(shape, "F32")) is constant


def open_model(folder: Path, weights: str, factory: str = "make") -> OpenedSource:
    (folder / "net.py").write_text(FACTORY)
    source = Source(name="a", factory=f"net.py:{factory}", weights=weights)
    return open_sources([source], folder, 0)["a"]


def check(opened: OpenedSource, expected: State) -> None:
    opened.check()
    found = opened.load_state()
    assert found.keys() == expected.keys()
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_shards_are_loaded_by_their_index_or_folder(tmp_path: Path) -> None:
    state = make().state_dict()
    names = sorted(state)
    (tmp_path / "m").mkdir()
    for file, part in zip(name_shards(2), (names[::2], names[1::2]), strict=True):
        save_file({f"module.{name}": state[name] for name in part}, tmp_path / "m" / file)
    places = {f"module.{name}": name_shards(2)[index % 2] for index, name in enumerate(names)}
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": places}))
    for weights in ("m", f"m/{INDEX}"):
        opened = open_model(tmp_path, weights)
        check(opened, state)
        assert [path.name for path in opened.files] == ["net.py", INDEX, *name_shards(2)]


@pytest.mark.parametrize("factory", ["make", "make_half"])
def test_half_precision_is_computed_in_float32(tmp_path: Path, factory: str) -> None:
    half = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in make().state_dict().items()
    }
    save_file(half, tmp_path / "a.safetensors")
    widened: dict[str, Tensor] = {
        name: value.float() if value.is_floating_point() else value for name, value in half.items()
    }
    opened = open_model(tmp_path, "a.safetensors", factory)
    check(opened, widened)
    assert opened.make()(torch.randn(2, 3)).dtype == torch.float32


def test_infinity_in_a_half_precision_file_is_called_an_overflow(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in make().state_dict().items() if value.is_floating_point()}
    state["0.weight"][0, 0] = 1e6
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"infinity .*0\.weight") as caught:
        open_model(tmp_path, "a.safetensors").check()
    assert "65504 overflowed" in caught.value.hint


def test_a_sessions_compiled_or_parallel_module_is_taken_out_of_its_wrapper() -> None:
    net = make()
    wrapped = nn.DataParallel(net)
    opened = open_sources([Source(name="a", held=True)], Path(), 0, {"a": wrapped})["a"]
    assert opened.untrained.state_dict().keys() == net.state_dict().keys()
