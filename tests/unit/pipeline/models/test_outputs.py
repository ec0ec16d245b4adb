"""What a model returns, as named tensors."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.export.graph import trace_graph
from rankship_pipeline.models.outputs import flatten, list_dropped

ONE, TWO = torch.zeros(3, 2), torch.ones(3, 4)
Pair = namedtuple("Pair", ["left", "right"])  # noqa: PYI024 - as users have them


@dataclass
class Found:
    logits: Tensor
    cache: object = None


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (ONE, ["output"]),
        ((ONE, TWO), ["0", "1"]),
        ([ONE], ["0"]),
        ({"a": ONE, "b": [TWO, None]}, ["a", "b.0"]),
        (Pair(ONE, {"x": TWO}), ["left", "right.x"]),
        (Found(ONE), ["logits"]),
    ],
)
def test_every_tensor_has_a_name(given: object, names: list[str]) -> None:
    found = flatten(given)
    assert list(found) == names
    assert found[names[0]] is ONE
    assert list_dropped(given) == []


def test_what_is_no_tensor_is_left_out_and_named() -> None:
    given = {"y": ONE, "loss": torch.tensor(1.0), "steps": 3, "none": None, "cache": Found}
    assert list(flatten(given)) == ["y"]
    assert list_dropped(given) == ["loss (a scalar)", "steps (int)", "cache (type)"]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"a": self.a(x), "none": None, "rest": (self.b(x), x.sum())}


def test_a_graph_gives_the_named_outputs_alone_and_keeps_the_parameters_names() -> None:
    module, x = Mixed().eval(), torch.randn(1, 4)
    graph = trace_graph(module, (x,), ("rest.0", "a"))
    found = graph.module()(x)
    torch.testing.assert_close(found, (module.b(x), module.a(x)))
    assert set(graph.state_dict) == set(module.state_dict())
    assert isinstance(module(x), dict), "the module is as it was"
