from pathlib import Path

import pytest
import torch

from make.recipes import save_shifted, state_model
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.flow import preflight
from rankship_pipeline.flow.preflight import prepare, redraw
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.choices import DataChoice, ExportChoice, Recipe, Source
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
