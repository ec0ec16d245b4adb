from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rankship as rs
from make.nets import count_hooks
from rankship_pipeline.factors.rebuild import swap_chains
from rankship_pipeline.flow.replaceable import MOST_CALLS, find_unreplaceable
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.layers import find_layers

RANKS, NOTHING = rs.RankChoice(step=2), rs.RankChoice(exclude=("first", "last"))


class Net(nn.Module):
    """Layers that are read, that nobody calls, and that may be replaced."""

    def __init__(self, use: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.use = use
        self.first = nn.Linear(16, 32)
        self.read = nn.Linear(32, 32)
        self.last = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.use(self, torch.relu(self.first(x)))))
        return y


def read_weight(net: Net, x: Tensor) -> Tensor:
    """As a function on its weight; it is never called."""
    return functional.linear(x, net.read.weight, net.read.bias)


def call_and_read(net: Net, x: Tensor) -> Tensor:
    """Called, and its weight added to the output."""
    return torch.as_tensor(net.read(x) + net.read.weight.sum())


def ask_shape(net: Net, x: Tensor) -> Tensor:
    """Another result without its weight."""
    y = net.read(x)
    return torch.as_tensor(y if isinstance(net.read.weight, Tensor) else y[:1])


def ask_type(net: Net, x: Tensor) -> Tensor:
    """As transformers' T5 does: no more than the weight's type and the bias."""
    return torch.as_tensor(net.read(x.to(net.read.weight.dtype)) + net.read.bias)


def leave_out(_net: Net, x: Tensor) -> Tensor:
    """Nothing asks for it."""
    return x


def call_often(net: Net, x: Tensor) -> Tensor:
    """More often than a graph could hold."""
    for _ in range(MOST_CALLS + 1):
        x = net.read(x)
    return x


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (read_weight, "the model never calls it"),
        (leave_out, "the model never calls it"),
        (call_and_read, "the model fails without its weight (AttributeError)"),
        (ask_shape, "the model gives another shape without it"),
        (call_often, f"the model calls it {MOST_CALLS + 1} times for one sample"),
        (ask_type, None),
    ],
)
def test_a_layer_that_cannot_be_replaced_is_found(use: Callable[[Net, Tensor], Tensor], reason: str | None) -> None:
    net = Net(use).eval()
    parts = dict(net.named_modules())
    found = find_unreplaceable(net, find_layers(net), (torch.randn(5, 16),))
    assert found == ({} if reason is None else {"read": reason})
    assert dict(net.named_modules()) == parts, "every layer is back in its place"
    assert count_hooks(net) == 0


class Experts(nn.Module):
    """One of two layers, as the sample's first number says."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.experts[int(one[0] > 0)](one[None]) for one in x])


def test_an_expert_may_wait_for_its_sample() -> None:
    x = torch.randn(9, 4)
    x[:, 0] = -1
    net = Experts()
    assert find_unreplaceable(net, find_layers(net), (x,)) == {"experts.1": "the model never calls it"}
    x[5, 0] = 1
    assert find_unreplaceable(net, find_layers(net), (x,)) == {}


def test_few_culprits_cost_few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(32)))
    layers, runs = find_layers(net), []

    def count(model: nn.Module, plan: dict[str, object]) -> object:
        runs.append(set(plan))
        if "13" in plan:
            raise ValueError
        return swap_chains(model, plan)  # type: ignore[arg-type]  # factors

    monkeypatch.setattr("rankship_pipeline.flow.replaceable.swap_chains", count)
    assert list(find_unreplaceable(net, layers, (torch.randn(2, 4),))) == ["13"]
    assert len(runs) == 1 + 2 * 5


def test_what_stays_dense_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(read_weight).eval()
    small = rs.compress(net, torch.randn(64, 16), kept_parameters=0.8, ranks=RANKS, store=tmp_path)
    assert "stays dense, as the model never calls it: read" in capsys.readouterr().err
    assert {layer.name for layer in small.plan.layers} == {"first", "last"}
    assert small.plan.fixed_parameters == 32 * 32 + 32 + 32 + 8
    with pytest.raises(
        InputError, match=r"no layer of the model can be factored: stays dense, as the model never calls it: read"
    ):
        rs.compress(net, torch.randn(64, 16), kept_parameters=0.8, ranks=NOTHING, store=tmp_path)
