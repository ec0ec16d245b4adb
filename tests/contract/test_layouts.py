"""Every exporter: tensors that do not lie in row-major order come out as the same numbers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.export.artifact import Part, export_file, find_proof, read_artifact, write_artifact
from rankship_pipeline.export.graph import trace_graph
from rankship_pipeline.export.parity import verify_artifact
from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.session.runner import HostRunner

WIDTH = 64  # LiteRT takes weights of some size for each other, not the smallest


class Turned(nn.Module):
    """Convolutions in channels_last, and three transposed weights of one shape, one of them no parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, WIDTH, 3))
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for layer in (self.first, self.second):
            layer.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).T / 8)
        self.third = torch.randn(WIDTH, WIDTH).T
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolutions(x.to(memory_format=torch.channels_last)).mean((2, 3))
        return torch.as_tensor(self.second(torch.relu(self.first(torch.relu(y @ self.third)))))


@pytest.mark.parametrize("name", FORMATS)
def test_weights_and_inputs_in_any_order_compute_the_same(name: Format, tmp_path: Path) -> None:
    images = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    part, store = Part("dense", Turned().eval(), (images.to(memory_format=torch.channels_last),)), Store(tmp_path)
    graph = trace_graph(part.module, tuple(tensor[:1] for tensor in part.samples))

    def make(target: Path) -> None:
        write_artifact(
            target,
            store.name("a", {}),
            part,
            name,
            lambda path: export_file(graph, name, path),
            recipe_sha256="r",
            source_sha256={},
        )

    artifact = read_artifact(store.produce("a", {}, make))
    path, inputs, expected = find_proof(artifact, store)
    assert verify_artifact(artifact, path, inputs, expected, HostRunner(), ParityChoice()).max_relative_error < 1e-5
