"""Grams of many rows, of layers that read one tensor, and of layers too wide for a Gram of their inputs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate import calibrate, grams
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.evaluate.rows import (
    as_outputs,
    as_rows,
    sample_outputs,
    sample_patches,
    sample_places,
    sample_rows,
)
from rankship_pipeline.models.layers import find_layers, is_factorable

MODULES = [
    nn.Conv2d(2, 3, 3, stride=2, padding=1),
    nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2)),
    nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    nn.Conv1d(2, 3, 5, stride=2, padding=2),
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_patches_at_all_places_are_those_that_unfolding_gives(module: nn.Conv1d | nn.Conv2d) -> None:
    x = torch.randn(4, 2, 9, 8) if isinstance(module, nn.Conv2d) else torch.randn(4, 2, 9)
    places = torch.arange(module(x)[0, 0].numel())
    every = as_rows(module, x)
    torch.testing.assert_close(sample_patches(module, x, places.expand(4, -1)), every)
    some = torch.tensor([[3, 1], [0, 2], [1, 1], [2, 0]])
    expected = every.view(4, len(places), -1)[torch.arange(4)[:, None], some].flatten(0, 1)
    torch.testing.assert_close(sample_patches(module, x, some), expected)


def test_in_turn_every_place_is_drawn_equally_often() -> None:
    drawn = torch.cat([sample_places(12, 0.25, turn, 2) for turn in range(0, 8, 2)])
    assert drawn.shape == (8, 3)
    assert drawn.flatten().bincount().tolist() == [2] * 12


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 3, padding=1), lambda: nn.Linear(16, 5)])
def test_a_sample_of_positions_is_a_gram_and_a_curvature_of_the_same_size(
    monkeypatch: pytest.MonkeyPatch, make: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(make()).eval()
    x = torch.randn(300, 3, 16, 16) + torch.linspace(0, 2, 16)
    layers = find_layers(net)
    whole = collect_grams(net, (x,), layers)["0"], collect_curvatures(net, (x,), layers)["0"]
    monkeypatch.setattr(calibrate, "_FEW", 4096)
    found = collect_grams(net, (x,), layers)["0"], collect_curvatures(net, (x,), layers)["0"]
    for some, every in zip(found, whole, strict=True):
        assert not torch.equal(some, every)
        assert float((some - every).norm() / every.norm()) < 0.1


class Attention(nn.Module):
    """Two layers that read one tensor, and one that reads what has been written into it since."""

    def __init__(self, columns: int = 6, rows: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.late = (nn.Linear(columns, rows) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        early = self.q(x) + self.k(x)
        y: Tensor = early + self.late(x.clamp_(min=0))
        return y


def test_layers_that_read_one_tensor_are_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    add = grams._add_squares

    def count(gram: Tensor, rows: Tensor, weight: float) -> None:
        calls.append(1)
        add(gram, rows, weight)

    monkeypatch.setattr(grams, "_add_squares", count)
    net, x = Attention().eval(), torch.randn(20, 6)
    found = collect_grams(net, (x,), find_layers(net))
    assert len(calls) == 2
    rows = x.double()
    for name in ("q", "k"):
        torch.testing.assert_close(found[name], rows.T @ rows / 20)
    torch.testing.assert_close(found["late"], rows.clamp(0).T @ rows.clamp(0) / 20)
    assert found["q"].data_ptr() != found["k"].data_ptr()  # the store keeps no shared memory


@pytest.mark.parametrize("bias", [False, True])
def test_a_wide_layers_gram_is_that_of_its_outputs(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:  # noqa: FBT001 - a parameter of the test
    monkeypatch.setattr("rankship_pipeline.models.layers._WIDEST", 10)
    net = nn.Sequential(nn.Linear(12, 5, bias=bias), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(30, 12)
    W = net.get_parameter("0.weight").detach().double()
    found = collect_grams(net, (x,), find_layers(net))
    torch.testing.assert_close(found["0"], W @ x.double().T @ x.double() @ W.T / 30, rtol=1e-5, atol=1e-6)
    assert found["2"].shape == (5, 5)


def test_wide_layers_that_read_one_tensor_have_each_its_own_outputs_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankship_pipeline.models.layers._WIDEST", 5)
    net, x = Attention().eval(), torch.randn(20, 6)
    found = collect_grams(net, (x,), find_layers(net))
    for name in ("q", "k"):
        outputs = x.double() @ net.get_parameter(f"{name}.weight").detach().double().T
        torch.testing.assert_close(found[name], outputs.T @ outputs / 20, rtol=1e-5, atol=1e-6)


def test_what_only_its_own_factors_need_is_kept_of_the_shorter_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankship_pipeline.models.layers._LONG", 10)
    net, x = nn.Sequential(nn.Conv2d(12, 5, 1), nn.ReLU(), nn.Conv2d(5, 11, 1)).eval(), torch.randn(9, 12, 4, 3)
    merged = find_layers(net)
    alone = [replace(layer, only_factored=True) for layer in merged]
    grams, narrow = collect_grams(net, (x,), merged), collect_grams(net, (x,), alone)
    curvatures, short = collect_curvatures(net, (x,), merged), collect_curvatures(net, (x,), alone)
    W, M = (net.get_parameter(f"{name}.weight").detach().double().flatten(1) for name in ("0", "2"))
    torch.testing.assert_close(narrow["0"], W @ grams["0"] @ W.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(short["2"], M.T @ curvatures["2"] @ M, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close((narrow["2"], short["0"]), (grams["2"], curvatures["0"]))


def test_tall_layers_that_read_one_tensor_have_each_the_curvature_of_its_own_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rankship_pipeline.models.layers._LONG", 6)
    net, x = nn.Sequential(nn.Linear(5, 3), Attention(3, 6)).eval(), torch.randn(20, 5)
    layers = find_layers(net)
    whole = collect_curvatures(net, (x,), layers)
    short = collect_curvatures(net, (x,), [replace(layer, only_factored=True) for layer in layers])
    for name in ("1.q", "1.k", "1.late"):
        W = net.get_parameter(f"{name}.weight").detach().double()
        torch.testing.assert_close(short[name], W.T @ whole[name] @ W, rtol=1e-5, atol=1e-8)


def test_halves_of_many_columns_are_kept_in_float32_and_of_at_most_exact_columns_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrate, "EXACT", 8)
    net = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    halves = calibrate.collect_halves(collect_grams, net, (torch.randn(11, 9),), find_layers(net))
    assert {name: (one.dtype, one.shape) for name, one in halves.items()} == {
        "0": (torch.float32, (2, 9, 9)),
        "2": (torch.float64, (2, 8, 8)),
    }


def test_a_curvature_of_many_rows_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 7)).eval(), (torch.randn(90, 9),)
    exact = collect_curvatures(net, inputs, find_layers(net))
    monkeypatch.setattr(calibrate, "EXACT", 7)
    found = collect_curvatures(net, inputs, find_layers(net))
    assert {name: one.dtype for name, one in found.items()} == {"0": torch.float32, "2": torch.float64}
    torch.testing.assert_close(found["0"].double(), exact["0"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("module", MODULES[:1] + MODULES[3:] + [nn.Linear(2, 5)], ids=str)
def test_some_rows_of_an_output_are_those_of_all_its_rows(module: nn.Module) -> None:
    assert is_factorable(module)
    y = (
        torch.randn(4, 7, 5)
        if isinstance(module, nn.Linear)
        else module(torch.randn(4, 2, *[9] * (module.weight.ndim - 2)))
    )
    every = as_outputs(module, y)
    for turn in (0, 3):
        expected, each = sample_rows(every, 0.3, turn)
        found, weight = sample_outputs(module, y, None, lambda total: 0.3 * total / len(every), turn)
        assert weight == each > 1
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sample_outputs(module, y, None, lambda _: 1.0, 0)[0], every)


def test_thinned_samples_are_spread_evenly() -> None:
    (few,), (all_of_them,) = calibrate.thin((torch.arange(11),), 3), calibrate.thin((torch.arange(11),), 11)
    assert few.tolist() == [0, 5, 10]
    assert all_of_them.tolist() == list(range(11))
