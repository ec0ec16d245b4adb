"""Ranges that a model cannot hold are found before long work, with the axis, the length and the line of code."""

from pathlib import Path

import pytest

from make.recipes import save_shifted, state_model
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation.errors import InputError, UnsupportedOp
from rankship_pipeline.recipe.rules import read_recipe

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.places, self.head = nn.Embedding(9, 8), nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, ids):
        places = self.places(torch.arange(ids.shape[1]))
        return self.head(nn.functional.relu(self.table(ids) + places).mean(1))

class Fixed(Net):
    def forward(self, ids):
        return super().forward(ids) if len(ids) < 4 else super().forward(ids) * 1.0

def make():
    return Net()

def make_fixed():
    return Fixed()

def load():
    ids = torch.randint(9, (40, 6), generator=torch.Generator().manual_seed(1))
    return {"calibration": {"a": ids[:20]}, "test_inputs": ids[20:], "test_labels": torch.arange(20) % 3}
"""
AXIS = '[[export.axes]]\nname = "sequence"\naxis = 1\nrange = [{}]\n'


def prepare_with(folder: Path, export: str, *, maker: str = "make", formats: str = '["onnx"]') -> Prepared:
    (folder / "net.py").write_text(NET)
    save_shifted(folder, {"a": f"net.py:{maker}"})
    (folder / "r.toml").write_text(
        'name = "r"\n'
        + state_model("a", f"net.py:{maker}", weights="a.safetensors")
        + '[data]\nloader = "net.py:load"\n'
        f"[budget]\nkept_parameters = 0.9\n[ranks]\nstep = 1\n[export]\nformats = {formats}\n{export}"
    )
    return prepare(read_recipe(folder / "r.toml"), folder)


def test_ranges_that_the_model_holds_pass(tmp_path: Path) -> None:
    assert prepare_with(tmp_path, "batch = [1, 8]\n" + AXIS.format("1, 10")).recipe.export.batch == (1, 8)


def test_a_length_that_the_model_cannot_take_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vary from 1 to 11, and the model does not run with sequence 11: IndexError"):
        prepare_with(tmp_path, AXIS.format("1, 11"))


def test_an_axis_that_the_code_decides_on_is_refused_for_one_file_and_allowed_for_a_file_a_shape(
    tmp_path: Path,
) -> None:
    with pytest.raises(UnsupportedOp, match=r"vary in batch 1 to 8: .*net.py:\d+ \(return super\(\)"):
        prepare_with(tmp_path, "batch = [1, 8]", maker="make_fixed")
    prepare_with(tmp_path, "batch = [1, 8]", maker="make_fixed", formats='["tflite"]')
