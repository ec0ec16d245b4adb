"""What of a traced graph is idle: what varies with no input, and what reaches no output."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankship_pipeline.export.graph import expect_operators, lay_out, order_rows, trace_graph
from rankship_pipeline.export.reach import find_idle_weights

CONSTANT, UNUSED = "its output is the same for every input", "no output depends on it"


class Idle(nn.Module):
    """Layers that depend on no input in several ways, one that is not used, and others that only look like these."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.after = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.on_zeros, self.on_buffer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.both, self.unused, self.chained = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.without_gradient, self.read, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("fixed", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.places(torch.arange(x.shape[1], device=x.device)))
        y = y + self.on_zeros(torch.zeros_like(x)) + self.on_buffer(self.get_buffer("fixed"))
        y = y + self.both(x.new_ones(4)) + self.both(x)
        self.unused(self.chained(x))
        with torch.no_grad():
            y = y + self.without_gradient(x)
        return torch.as_tensor(self.head(y * self.read.weight.sum()))


def test_idle_layers_are_found_with_the_reason() -> None:
    found = find_idle_weights(trace_graph(Idle().eval(), (torch.randn(1, 6, 4),)))
    assert {name.removesuffix(".weight"): why for name, why in found.items() if name.endswith(".weight")} == {
        "places": CONSTANT,
        "after": CONSTANT,
        "on_zeros": CONSTANT,
        "on_buffer": CONSTANT,
        "unused": UNUSED,
        "chained": UNUSED,
    }


class Products(nn.Module):
    """Constant matrices from either side, an unrolled network, a weight that is computed, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.left = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(7, 6))
        self.computed, self.recurrent = nn.Parameter(torch.randn(5, 4)), nn.LSTM(4, 8, batch_first=True)
        self.twice = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        products = x @ self.right, self.left @ x, functional.linear(x, self.computed.exp())
        return *products, self.recurrent(x)[0], self.twice(torch.relu(self.twice(x))) + self.twice(x)


def test_the_operators_that_a_file_must_and_may_hold() -> None:
    expected = expect_operators(trace_graph(Products().eval(), (torch.randn(1, 6, 4),)))
    needed, allowed = (sorted((one.rows, one.columns) for one in side) for side in (expected.needed, expected.allowed))
    assert needed == [(3, 4), (4, 4), (4, 4), (7, 6)]
    assert {(5, 4), (32, 4), (32, 8)} < set(allowed)
    assert set(needed) < set(allowed)


def test_only_tensors_in_another_order_are_copied_to_row_major() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert order_rows(net) is net
    turned = nn.Linear(4, 6)
    turned.weight = nn.Parameter(torch.randn(4, 6).T)
    turned.register_buffer("held", torch.randn(2, 3).T)
    turned.__dict__["plain"] = torch.randn(2, 3).T  # no buffer: the tracer takes it for a constant
    ordered = order_rows(turned)
    for name in ("weight", "held", "plain"):
        before, after = getattr(turned, name), getattr(ordered, name)
        assert after.is_contiguous()
        assert not before.is_contiguous()
        assert torch.equal(before, after)


def test_strides_of_lengths_of_one_are_those_of_row_major_order_too() -> None:
    images = torch.randn(1, 1, 7, 5).to(memory_format=torch.channels_last)
    assert images.is_contiguous()  # torch does not mind, ExecuTorch does
    assert images.stride() != (35, 35, 5, 1)
    ordered = lay_out(images)
    assert ordered.stride() == (35, 35, 5, 1)
    assert torch.equal(ordered, images)
    assert lay_out(ordered) is ordered
