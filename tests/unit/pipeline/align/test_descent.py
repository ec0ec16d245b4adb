"""Unrelated models are named with figures before they are merged; fine-tuned ones are not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from make.recipes import save_shifted, state_model, state_rest
from rankship_pipeline.align.descent import describe_descent, measure_likeness
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.recipe.rules import read_recipe

NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

def load():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return {"calibration": {"a": x[:24], "b": x[24:48]}, "test_inputs": x[48:], "test_labels": torch.arange(16) % 3}
"""


def draw(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(64, 32, generator=random), "n.weight": torch.ones(64), "i": torch.ones(3, 3).int()}


def test_only_unrelated_weights_are_cautioned_about() -> None:
    first, other = draw(0), draw(1)
    said = describe_descent("b", other, "a", first, "do this")
    assert said is not None
    assert said.startswith("b against a: they share no descent")
    assert said.endswith("do this")
    tuned = {name: tensor + 0.3 * torch.randn(64, 32) for name, tensor in first.items() if name == "a.weight"}
    assert describe_descent("b", tuned, "a", first, "") is None
    assert measure_likeness(first, {f"module.{name}": tensor for name, tensor in first.items()}) == [pytest.approx(1)]
    assert describe_descent("b", {}, "a", first, "") is None


@pytest.mark.parametrize("related", [True, False])
def test_a_recipe_says_it_before_the_work(tmp_path: Path, *, related: bool) -> None:
    (tmp_path / "net.py").write_text(NET)
    save_shifted(tmp_path, {"a": "net.py:make", "b": "net.py:make"})
    if not related:
        from safetensors.torch import load_file, save_file

        state = load_file(tmp_path / "b.safetensors")
        save_file({name: value.flip(0).contiguous() for name, value in state.items()}, tmp_path / "b.safetensors")
    models = "".join(state_model(name, "net.py:make", weights=f"{name}.safetensors") for name in "ab")
    (tmp_path / "r.toml").write_text(f'name = "r"\n{models}{state_rest(0.6)}')
    notes = prepare(read_recipe(tmp_path / "r.toml"), tmp_path).notes
    assert any("share no descent" in note and 'align = "weights"' in note for note in notes) is not related
