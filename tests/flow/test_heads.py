"""Two tasks, one backbone: proven and timed over SSH, deployed with the heads beside it, answered from the files."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_pipeline.cli import main

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 12), nn.ReLU(),
        )
        self.top = nn.Linear(12, classes)

    def forward(self, x):
        return self.top(self.body(x))

def three():
    return Net(3)

def four():
    return Net(4)

def load():
    x = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    tests = {"fruit": (x[64:80], torch.arange(16) % 3), "side": (x[80:], torch.arange(16) % 4)}
    return {"calibration": {"fruit": x[:32], "side": x[32:64]}, "tests": tests}
"""
RECIPE = """
name = "two tasks"

[[models]]
name = "fruit"
factory = "model.py:three"
weights = "fruit.safetensors"

[[models]]
name = "side"
factory = "model.py:four"
weights = "side.safetensors"

[data]
loader = "model.py:load"

[merge]
head = "top"

[budget]
kept_parameters = 0.6

[ranks]
step = 2

[parity]
samples = 8

[export]
formats = ["onnx"]
"""


class Net(nn.Module):
    """As in the recipe's own file, to give weights."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers = (nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))
        self.body = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(256, 12), nn.ReLU())
        self.top = nn.Linear(12, classes)


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "model.py").write_text(MODEL)
    for seed, (name, classes) in enumerate((("fruit", 3), ("side", 4))):
        torch.manual_seed(seed)
        save_file(Net(classes).state_dict(), folder / f"{name}.safetensors")
    (folder / "recipe.toml").write_text(RECIPE)
    brief = "canary = false\nrounds = 2\nmin_samples = 20\nmin_duration_ms = 20\n"
    (folder / "suite.toml").write_text(f'recipe = "recipe.toml"\n{brief}')
    return folder / "recipe.toml"


@pytest.mark.slow
def test_tasks_share_a_backbone_on_the_board(
    two_tasks: Path, inventory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, results = str(tmp_path / "store"), tmp_path / "results"
    where = ["--inventory", str(inventory), "--store", store]
    assert main(["build", str(two_tasks), "--store", store]) == 0, capsys.readouterr().err
    suite = str(two_tasks.with_name("suite.toml"))
    assert main(["bench", suite, "--on", "one", *where, "--results", str(results)]) == 0, capsys.readouterr().err
    (folder,) = results.glob("[!.]*")
    header = open_bundle(folder).header
    assert [one.key.task for one in header.verified_on_device] == [None] * 2 + ["fruit", "side"] * 2
    assert {trial.artifact_sha256 for trial in open_bundle(folder).trials} == {
        one.sha256 for one in header.build.artifacts
    }
    page = (folder / "report.html").read_text()
    assert "Only the backbone that all tasks share is timed" in page
    assert "What each specialist keeps" in page

    capsys.readouterr()
    flags = ["--on", "two", "--format", "onnx", "--task", "side"]
    assert main(["deploy", str(two_tasks), *flags, *where]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "two: compressed onnx, head of side: " in printed
    assert "head of fruit" not in printed
    backbone, head = (onnxruntime.InferenceSession(path) for path in _list_paths(printed))
    x = np.zeros((1, 1, 8, 8), np.float32)
    (features,) = backbone.run(None, {backbone.get_inputs()[0].name: x})
    (logits,) = head.run(None, {head.get_inputs()[0].name: features})
    assert (features.shape, logits.shape) == ((1, 12), (1, 4))

    assert main(["deploy", str(two_tasks), "--on", "two", "--task", "colour", *where]) == 2
    error = capsys.readouterr().err
    assert "no head of colour" in error
    assert "its tasks are fruit, side" in error


def _list_paths(printed: str) -> list[str]:
    """Where the deployed files lie, as the verb says it: the backbone, then the heads."""
    return [
        line.partition(": compressed onnx")[2].partition(": ")[2]
        for line in printed.splitlines()
        if ": compressed" in line
    ]
