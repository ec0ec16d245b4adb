"""Merge methods as recipes ask for them: the base, the keys, what is refused, and what is kept in the store."""

import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from make.recipes import make_stages as open_stages
from make.recipes import save_shifted, state_model, state_rest
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, MergeMismatch
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.source import load_function
from rankship_pipeline.models.weights import copy_state
from rankship_pipeline.recipe.merge_methods import MergeMethod
from rankship_pipeline.recipe.rules import read_recipe

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x))).mean((2, 3)))

def wide():
    return Net(7)

def load():
    x = torch.randn(20, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    return {"calibration": {"a": x[:12], "b": x[6:]}, "test_inputs": x, "test_labels": torch.arange(20) % 3}
"""
MODEL = state_model("{0}", "net.py:Net", weights="{0}.safetensors")
BASE = '[merge.base]\nname = "start"\nfactory = "net.py:Net"\nweights = "base.safetensors"\n'
REST = state_rest(0.9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    save_shifted(tmp_path, dict.fromkeys(("base", "a", "b"), "net.py:Net"))
    return tmp_path


def write(folder: Path, merge: str, models: str = MODEL.format("a") + MODEL.format("b")) -> Path:
    path = folder / "recipe.toml"
    path.write_text(f'name = "merge"\n{models}[merge]\n{merge}\n{REST}')
    return path


def make_stages(folder: Path, merge: str) -> Stages:
    return open_stages(write(folder, merge), Store(folder / "store"))


def test_every_method_merges_by_a_recipe_and_says_where_it_interferes(folder: Path) -> None:
    stages = make_stages(folder, f'method = "ties"\n{BASE}')
    keys = set()
    for method in get_args(MergeMethod):
        model, interference = stages.merge(method)
        assert list(interference) == ["stem", "head"]
        assert all(0 < share < math.inf for share in interference.values()), (method, interference)
        assert model.module(stages.prepared.data.test_inputs[0]).isfinite().all()
        keys.add(model.entry.key)
    assert len(keys) == len(get_args(MergeMethod))
    best = stages.merge("joint")[1]
    rivals: tuple[MergeMethod, ...] = ("average", "regmean", "fisher")
    for method in rivals:
        other = stages.merge(method)[1]
        assert all(best[name] <= other[name] * (1 + 1e-5) for name in best)  # joint minimises just this


def test_what_shapes_a_merge_is_in_its_key(folder: Path) -> None:
    def find_key(merge: str, top: str = "") -> str:
        path = write(folder, merge)
        path.write_text(top + path.read_text())
        stages = Stages(prepare(read_recipe(path), folder), Store(folder / "store"), Steps(quiet=True))
        return stages.merge(stages.prepared.recipe.merge.method)[0].entry.key

    first = find_key(f'method = "dare"\n{BASE}')
    assert find_key(f'method = "dare"\ndrop = 0.2\nscale = 0.4\n{BASE}') == first  # the defaults, said aloud
    assert find_key(f'method = "dare"\ndrop = 0.3\n{BASE}') != first
    assert find_key(f'method = "dare"\n{BASE}', "seed = 1\n") != first
    ties = find_key(f'method = "ties"\n{BASE}')
    assert find_key(f'method = "ties"\n{BASE}', "seed = 1\n") == ties  # no chance in it
    assert find_key(f'method = "ties"\n{BASE.replace("base.safe", "a.safe")}') != ties


@pytest.mark.parametrize(
    ("merge", "complaint"),
    [
        ('method = "ties"', "merge: 'ties' needs the base that all models were trained from: name it in merge.base"),
        ('method = "iso"', "merge.method"),
        (
            'method = "average"\ndensity = 0.2',
            "merge.density is not used by 'average': it belongs to ties",
        ),
        (f'method = "average"\n{BASE}', "no merge of this recipe uses merge.base"),
        (f'method = "dare"\ndrop = 1.0\n{BASE}', r"merge.drop must lie in \[0, 1\), got 1.0"),
        (f'method = "ties"\n{BASE.replace("start", "a")}', "two models are called 'a'"),
        (f'method = "ties"\n{BASE}train = "net.py:load"', "model 'start' needs exactly one of `weights` and `train`"),
    ],
)
def test_a_merge_that_cannot_be_meant_is_refused_when_the_recipe_is_read(
    folder: Path, merge: str, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        read_recipe(write(folder, merge))


def test_slerp_of_three_and_another_architecture_as_base_are_refused_before_any_work(folder: Path) -> None:
    models = "".join(MODEL.format(name) for name in ("a", "b", "base"))
    with pytest.raises(InputError, match="'slerp' merges exactly two models, got 3"):
        read_recipe(write(folder, 'method = "slerp"', models))
    torch.manual_seed(0)
    save_file(copy_state(load_function("net.py:wide", folder)()), folder / "wide.safetensors")
    base = BASE.replace("net.py:Net", "net.py:wide").replace("base.safe", "wide.safe")
    with pytest.raises(MergeMismatch, match=r"start against a: .*\n.*"):
        prepare(read_recipe(write(folder, f'method = "ties"\n{base}')), folder)
