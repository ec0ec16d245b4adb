"""A recipe of seconds: two tiny specialists with weights on disk, three formats, every stage real."""

import sys
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rankship_targets.devices.device import Device
from rankship_targets.devices.inventory import Value, add_device

MODEL = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, 3),
    )

def load():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 1, 8, 8, generator=generator)
    return {"calibration": {"a": x[:32], "b": x[32:64]}, "test_inputs": x[64:], "test_labels": torch.arange(32) % 3}
"""

RECIPE = """
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


def write_recipe(folder: Path) -> Path:
    """Write the recipe with its model file and two checkpoints; gives the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(MODEL)
    (folder / "tiny.toml").write_text(RECIPE)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 3),
        )
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    return folder / "tiny.toml"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe")


@pytest.fixture(scope="session")
def shared_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that only read it, so that they share one store."""
    return write_recipe(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


class Server(Protocol):
    """What the fixture `ssh_server` gives."""

    device: Device


@pytest.fixture
def inventory(ssh_server: Server, tmp_path: Path) -> Path:
    """Two boards behind one server, each with a folder of its own whose name needs quoting."""
    board = ssh_server.device
    table: dict[str, Value] = {"transport": "ssh", "host": "127.0.0.1", "port": board.port, "user": board.user or ""}
    table |= {"host_key": board.host_key or "", "key_file": board.key_file or ""}
    for name in ("one", "two"):
        workdir = str(tmp_path / f"it's {name}")
        add_device(tmp_path / "devices.toml", name, {**table, "python": sys.executable, "workdir": workdir})
    return tmp_path / "devices.toml"
