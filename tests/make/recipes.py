"""Recipes of seconds: their text, the files that they name, and their stages."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.source import load_function
from rankship_pipeline.models.weights import copy_state
from rankship_pipeline.recipe.rules import read_recipe

# For a factory's file: two trainings that end apart.
TRAIN = """
def train(model, seed):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

def train_other(model, seed):
    train(model, seed)
    train(model, seed)
"""
TINY_MODEL = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, 3),
    )

def make_flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3))

def leave_untrained(model, seed):
    pass

def load():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 1, 8, 8, generator=generator)
    return {"calibration": {"a": x[:32], "b": x[32:64]}, "test_inputs": x[64:], "test_labels": torch.arange(32) % 3}

def load_one():
    return load() | {"calibration": {"a": load()["calibration"]["a"]}}
"""
# Data of a net of three classes called "net", which is not trained; another half calibrates for each seed.
LITTLE_DATA = """
def train(model, seed):
    pass

def load(seed=0):
    images = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:30]
    return {
        "calibration": {"net": images[chosen]}, "unlabelled": {"net": images},
        "test_inputs": images, "test_labels": torch.arange(60) % 3,
    }
"""
TINY_RECIPE = """
name = "tiny"

[[models]]
name = "a"
factory = "model.py:make"
weights = "a.safetensors"

[[models]]
name = "b"
factory = "model.py:make"
weights = "b.safetensors"

[data]
loader = "model.py:load"

[budget]
kept_parameters = 0.5

[ranks]
step = 2

[parity]
samples = 8

[[compare]]
name = "plain"
merge = "average"
ranks = "arp"
whitening = "plain"
"""


def state_model(name: str, factory: str = "net.py:make", **given: str) -> str:
    """A recipe's table of one model; `given` is where its weights come from."""
    lines = {"name": name, "factory": factory, **given}
    return "[[models]]\n" + "".join(f'{key} = "{value}"\n' for key, value in lines.items())


def state_rest(kept: float, loader: str = "net.py:load") -> str:
    """A recipe's end: its data, one format, its budget, and every rank on offer."""
    return (
        f'[data]\nloader = "{loader}"\n[export]\nformats = ["onnx"]\n[budget]\nkept_parameters = {kept}\n'
        "[ranks]\nstep = 1\n"
    )


def make_stages(recipe: Path, store: Store) -> Stages:
    """The stages of a recipe in its folder."""
    return Stages(prepare(read_recipe(recipe), recipe.parent), store, Steps(quiet=True))


def save_shifted(folder: Path, factories: Mapping[str, str]) -> None:
    """Write a checkpoint for each name and factory: alike where they can be, but for a shift that grows by place."""
    for seed, (name, factory) in enumerate(factories.items()):
        torch.manual_seed(0)
        net: nn.Module = load_function(factory, folder)()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * seed * torch.randn_like(parameter))
        save_file(copy_state(net), folder / f"{name}.safetensors")


def write_tiny_recipe(folder: Path) -> Path:
    """Write a recipe of two specialists with weights on disk, and of three formats; gives the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(TINY_MODEL)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        net: nn.Module = load_function("model.py:make", folder)()
        save_file(net.state_dict(), folder / f"{name}.safetensors")
    (folder / "tiny.toml").write_text(TINY_RECIPE)
    return folder / "tiny.toml"


def write_untrained_recipe(folder: Path, *names: str) -> Path:
    """Write a recipe of one format, of one untrained model ("a") or two ("a", "b"); gives its path."""
    (folder / "model.py").write_text(TINY_MODEL)
    train = "model.py:leave_untrained"
    models = "".join(state_model(name, "model.py:make_flat", train=train) for name in names)
    (folder / "tiny.toml").write_text(
        f'name = "tiny"\ndata.loader = "model.py:{"load" if len(names) > 1 else "load_one"}"\n'
        'budget.kept_parameters = 0.5\nranks.step = 2\nexport.formats = ["onnx"]\nparity.samples = 8\n' + models
    )
    return folder / "tiny.toml"


def write_priced_recipe(folder: Path, net: str, budget: str, step: int = 2) -> Path:
    """Write a recipe of one model, of the factory file `net`, whose layers are to be priced on a device."""
    (folder / "net.py").write_text(net)
    torch.manual_seed(0)
    made: nn.Module = load_function("net.py:make", folder)()
    save_file(made.state_dict(), folder / "a.safetensors")
    (folder / "net.toml").write_text(
        f'name = "net"\n{state_model("a", weights="a.safetensors")}[data]\nloader = "net.py:load"\n'
        f'[ranks]\nstep = {step}\nforms = ["svd"]\n[export]\nformats = ["onnx"]\n[parity]\nsamples = 4\n'
        f"[budget]\n{budget}"
    )
    return folder / "net.toml"
