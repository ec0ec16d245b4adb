"""Neurons left out through the front door: planned, saved, loaded, rounded, and refitted to changed inputs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rankship as rs

X = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
RANKS = rs.RankChoice(forms=("svd", "width"), step=4)


class Net(nn.Module):
    """A gated MLP around which the input is carried past, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(24, 64), nn.Linear(24, 64, bias=False)
        self.down, self.head = nn.Linear(64, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x + self.down(functional.silu(self.gate(x)) * self.up(x)))
        return logits


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("reconstruct", [False, True])
def test_a_plan_with_fewer_neurons_is_within_its_budget_and_loads(tmp_path: Path, *, reconstruct: bool) -> None:
    factors = rs.FactoriseChoice(reconstruct=reconstruct)
    small = rs.compress(make_net(), X, kept_parameters=0.6, ranks=RANKS, factorise=factors, progress=False)
    kept = small.plan.factors["down"].input_rank
    assert [str(small.plan.factors[name]) for name in ("gate", "up", "down")] == [
        f"width {kept}",
        f"width {kept}",
        f"width {kept}→24",
    ]
    assert sum(one.numel() for one in small.module.parameters()) <= 0.6 * (small.dense_parameters or 0)
    by_name = {layer.name: layer for layer in small.plan.layers}
    assert by_name["gate"].held_out_error is None
    assert by_name["gate"].relative_error == 0
    assert all(0 < (lost or 0) < 0.5 for lost in (by_name["down"].relative_error, by_name["down"].held_out_error))
    again = rs.load(small.save(tmp_path / "out"), into=make_net())
    torch.testing.assert_close(again(X), small.module(X), rtol=0, atol=0)


def test_fewer_neurons_lose_less_than_ranks_alone() -> None:
    net = make_net()
    ranks = [rs.RankChoice(forms=forms, step=4) for forms in (("svd",), ("svd", "width"))]
    lost = []
    for choice in ranks:
        small = rs.compress(net, X, kept_parameters=0.6, ranks=choice, progress=False)
        lost.append(float((small.module(X) - net(X)).detach().square().mean()))
    assert lost[1] < 0.7 * lost[0]


def test_bits_and_neurons_are_chosen_under_one_budget_of_bytes() -> None:
    small = rs.compress(make_net(), X, size_bytes=3_000, ranks=RANKS, weights=["float32", "int8"], progress=False)
    assert small.plan.total_cost <= 3_000
    by_name = {layer.name: layer for layer in small.plan.layers}
    assert {str(by_name[name].factors).partition(" ")[0] for name in ("gate", "up", "down")} == {"width"}
    assert {by_name[name].weights for name in ("gate", "up", "down")} == {"int8"}
    assert 0 < by_name["gate"].relative_error < 0.01  # by rounding
