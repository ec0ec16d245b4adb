"""Every toolchain that is installed rounds a small dense model to a file that its format's runtime runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankship_benchmarks.study.toolchains import TOOLCHAINS, Given
from rankship_pipeline.foundation.formats import FACTS
from rankship_pipeline.foundation.toolchain import find_version
from rankship_pipeline.recipe.precision import Computed
from rankship_targets.session.runner import HostRunner

INSTALLED = [name for name, one in TOOLCHAINS.items() if find_version(one.distribution)]


def make_given(activations: Computed) -> Given:
    """Layers of either kind, wide enough for the weights to be most of the file."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    if activations == "static":
        layers = [nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), *layers]
    module = nn.Sequential(*layers, nn.LazyLinear(256), nn.ReLU(), nn.Linear(256, 3)).eval()
    samples = (torch.randn(24, 1, 4, 4),)
    module(*samples)
    return Given(module, samples, (), activations)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("name", INSTALLED)
def test_a_toolchain_writes_a_small_file_that_answers_as_the_model(
    tmp_path: Path, name: str, activations: Computed
) -> None:
    tool, given = TOOLCHAINS[name], make_given(activations)
    path = tmp_path / f"model.{FACTS[tool.format].suffix}"
    tool.write(given, path)
    plain = given.write_float(tool.format, tmp_path / f"float.{FACTS[tool.format].suffix}")
    assert path.stat().st_size < 0.6 * plain.stat().st_size
    np.save(tmp_path / "x.npy", given.samples[0].numpy())
    (tmp_path / "out").mkdir()
    found = HostRunner().run(tool.format, path, [tmp_path / "x.npy"], tmp_path / "out")
    answers = torch.from_numpy(np.load(found.outputs[0]))
    with torch.inference_mode():
        expected = given.module(*given.samples)
    assert answers.dtype == torch.float32
    error = (answers - expected).norm() / expected.norm()
    assert 0 < error < 0.3
