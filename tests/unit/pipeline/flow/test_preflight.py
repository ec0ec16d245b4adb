from dataclasses import replace
from pathlib import Path

import pytest
import torch

from make.recipes import save_shifted, state_model, state_rest
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.flow import preflight
from rankship_pipeline.flow.preflight import prepare, redraw
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, UnsupportedOp
from rankship_pipeline.foundation.formats import FACTS
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source
from rankship_pipeline.recipe.export_choices import ExportChoice
from rankship_pipeline.recipe.rules import read_recipe

NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
"""
TABLE = "width,height\n" + "".join(f"{index % 7 - 3},{index % 5 - 2}\n" for index in range(60))
OWN = "normalise = { mean = [2.0, -1.0], std = [0.5, 2.0] }"
GIVEN = "normalise = { mean = [0.0], std = [1.0] }"


def test_answers_that_stand_for_labels_are_those_of_the_model_with_its_normalisation_folded_in(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "t.csv").write_text(TABLE)
    save_shifted(tmp_path, {"first": "net.py:make", "a": "net.py:make"})
    model = state_model("a", "net.py:make", weights="a.safetensors")
    (tmp_path / "r.toml").write_text(
        f'name = "r"\nquality = "classification"\n{model}{OWN}\n'
        f'[data]\ncsv = "t.csv"\n{GIVEN}\n[budget]\nkept_parameters = 0.9\n'
        '[ranks]\nstep = 1\n[export]\nformats = ["onnx"]\n'
    )
    prepared = prepare(read_recipe(tmp_path / "r.toml"), tmp_path)
    for data in (prepared.data, redraw(prepared, 1).data):
        built = Stages(prepared, Store(tmp_path / "store"), Steps(quiet=True)).load_source("a").module
        assert data.answers == "predictions"
        assert torch.equal(predict(built, data.test_inputs)["output"].argmax(-1), data.labels)


def test_a_missing_toolchain_is_named_before_any_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankship_pipeline.flow.checks.can_export", lambda _name: False)
    monkeypatch.setattr(preflight, "complete_recipe", lambda *_: pytest.fail("models were looked at first"))
    recipe = Recipe(
        name="r",
        models=(Source(name="a", huggingface="some/model"),),
        data=DataChoice(text="t.txt"),
        export=ExportChoice(formats=("onnx",)),
    )
    with pytest.raises(InputError, match="toolchain is not installed"):
        prepare(recipe, Path())


ODD_NETS = """
import torch
from torch import nn

class Places(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.places, self.layer, self.unused = nn.Embedding(16, 16), layer, nn.Linear(16, 16)

    def forward(self, x):
        y = self.places(torch.arange(16)).mean(0) + x
        return self.layer(y)

def make_places():
    return Places(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 3)))

def make_idle():
    return Places(nn.Softmax(-1))

class Noisy(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.2, training=True)

def make_noisy():
    return nn.Sequential(nn.Linear(16, 32), Noisy(32, 3))

class Asking(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

def make_asking():
    return nn.Sequential(nn.Linear(16, 32), Asking(32, 3))

def train(model, seed):
    pass

def load():
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    return {"calibration": {"a": x}, "test_inputs": x, "test_labels": torch.arange(32) % 3}
"""


def prepare_odd(factory: str, folder: Path) -> Prepared:
    (folder / "net.py").write_text(ODD_NETS)
    (folder / "r.toml").write_text('name = "r"\n' + state_model("a", factory, train="net.py:train") + state_rest(0.9))
    return prepare(read_recipe(folder / "r.toml"), folder)


def test_layers_that_are_constant_or_unused_stay_dense_and_are_named(tmp_path: Path) -> None:
    prepared = prepare_odd("net.py:make_places", tmp_path)
    assert [layer.name for layer in prepared.layers] == ["layer.0", "layer.1"]
    assert prepared.notes == (
        "stays dense, as its output is the same for every input: places",
        "stays dense, as no output depends on it: unused",
    )
    assert prepared.fixed_parameters == 16 * 16 + (16 + 1) * 16 + 32 + 3


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        ("net.py:make_idle", InputError, "no layer is left to factor: .*every input: places; .*: unused"),
        ("net.py:make_noisy", InputError, "differ from run to run .*random"),
        ("net.py:make_asking", UnsupportedOp, "torch.export cannot trace the model"),
    ],
)
def test_a_model_that_no_file_can_hold_is_refused_before_any_work(
    factory: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        prepare_odd(factory, tmp_path)


def test_a_dense_model_that_a_format_cannot_hold_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FACTS, "onnx", replace(FACTS["onnx"], limit_bytes=4_000))
    with pytest.raises(InputError, match=r"the weights take .* kB, a file of onnx holds at most 4.0 kB"):
        prepare_odd("net.py:make_places", tmp_path)
