"""Rounding a model in running order: on the grids, close to the float model, and better than layer by layer."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from make.nets import count_hooks, is_same
from rankship_pipeline.factors.analysis import analyse, fill
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import find_layers, get_layer
from rankship_pipeline.quantise import in_order
from rankship_pipeline.quantise.grid import Grid, is_on_grid, read_rows, write_rows
from rankship_pipeline.quantise.in_order import find_grids, round_layers
from rankship_pipeline.quantise.rounding import round_matrix
from rankship_pipeline.quantise.sizes import SIMULATED


class Images(nn.Module):
    """Convolutions with a residual, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 12, 3, padding=1)
        self.body = nn.Conv2d(12, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 12, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 2, 6, 6) to (batch, 5)."""
        y = torch.relu(self.stem(x))
        y = y + torch.relu(self.body(y))
        logits: Tensor = self.head(torch.relu(self.up(y)).mean((2, 3)))
        return logits


class Words(nn.Module):
    """A table, a mixing layer that runs twice, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.twice = nn.Linear(32, 32)
        self.last = nn.Linear(32, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, length) to (batch, 6)."""
        y = self.twice(torch.relu(self.twice(self.table(tokens))))
        logits: Tensor = self.last(torch.relu(y).mean(1))
        return logits


def make_images() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Images().eval(), torch.randn(96, 2, 6, 6)


def make_words() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Words().eval(), torch.randint(40, (96, 7))


def factor(model: nn.Module, plan: dict[str, Factors]) -> nn.Module:
    return fill(analyse(model, find_layers(model), {}, "plain"), plan)


def round_to_nearest(model: nn.Module, grids: dict[str, Grid]) -> nn.Module:
    rounded = copy.deepcopy(model)
    for name, grid in grids.items():
        module = get_layer(rounded, name)
        write_rows(module, round_matrix(read_rows(module), grid.precision, None, grid.block))
    return rounded


@torch.inference_mode()
def measure(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    wanted = model(x)
    return float((other(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


CHAINS = {"stem": Factors(rank=6), "body": Factors(form="tucker", rank=8, input_rank=8)}


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    ("make", "plan"),
    [(make_images, CHAINS), (make_images, {"body": Factors(form="spatial", rank=8)}), (make_words, {}),
     (make_words, {"table": Factors(rank=12)})],
)  # fmt: skip
def test_all_weights_are_on_their_grids_and_the_outputs_close(
    make: Callable[[], tuple[nn.Module, Tensor]], plan: dict[str, Factors], weights: Precision
) -> None:
    dense, x = make()
    model = factor(dense, plan)
    before = copy.deepcopy(model)
    types = {layer.name: weights for layer in find_layers(dense)}
    begun: list[str] = []
    rounded = round_layers(model, types, (x,), SIMULATED, begun.append)
    grids = find_grids(model, types, SIMULATED)
    assert sorted(begun) == sorted(grids)
    assert set(grids) >= {f"{name}.{at}" for name in plan for at in range(2)}
    assert {grid.precision for grid in grids.values()} == {weights}
    for name, grid in grids.items():
        assert is_on_grid(read_rows(get_layer(rounded, name)), grid.precision, grid.block)
    unseen = torch.randint(40, (64, 7)) if x.ndim == 2 else torch.randn(64, 2, 6, 6)
    assert measure(model, rounded, unseen) < (1e-3 if weights == "int8" else 0.25)
    assert is_same(model, before)
    assert count_hooks(model, rounded) == 0


def test_knowing_the_inputs_beats_rounding_to_the_nearest_on_unseen_ones() -> None:
    dense, x = make_images()
    model = factor(dense, CHAINS)
    types: dict[str, Precision] = {layer.name: "int4" for layer in find_layers(dense)}
    unseen = torch.randn(200, 2, 6, 6)
    nearest = measure(model, round_to_nearest(model, find_grids(model, types, SIMULATED)), unseen)
    assert measure(model, round_layers(model, types, (x,), SIMULATED), unseen) < 0.7 * nearest


def test_an_operator_that_cannot_have_its_type_has_the_next_one() -> None:
    dense, _ = make_images()
    types: dict[str, Precision] = {layer.name: "int4" for layer in find_layers(dense)}
    grids = find_grids(dense, types)
    assert grids == {name: Grid(precision="int8") for name in ("stem", "body", "head")}
    wide = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 40), nn.Linear(40, 5)).eval()
    found = find_grids(wide, {"0": "int4", "1": "float32", "2": "int4"})
    assert found == {"0": Grid(precision="int4", block=32), "2": Grid(precision="int8")}
    rounded = round_layers(wide, {"0": "int4", "1": "float32"}, (torch.randn(50, 64),))
    assert is_on_grid(rounded.get_submodule("0").weight, "int4", 32)  # type: ignore[arg-type]  # a linear layer's
    assert torch.equal(rounded.get_submodule("1").weight, wide[1].weight)  # type: ignore[arg-type]


def test_a_bias_takes_up_what_rounding_moves_the_mean_by() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.rand(400, 16) + 3
    rounded = round_layers(model, {"0": "int4"}, (x,), SIMULATED)
    torch.testing.assert_close(rounded(x).mean(0), model(x).mean(0), atol=1e-4, rtol=1e-4)


def test_fewer_samples_are_looked_at_where_their_records_would_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = make_images()
    looked = []

    class Noted(in_order._Run):
        def __init__(self, teacher: nn.Module, student: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
            looked.append(sum(len(batch[0]) for batch in batches))
            super().__init__(teacher, student, batches)

    monkeypatch.setattr(in_order, "_Run", Noted)
    for allowed in (2**31, 200_000):
        monkeypatch.setattr(in_order, "HELD_BYTES", allowed)
        round_layers(model, {"stem": "int8", "body": "int8", "head": "int8"}, (x,))
    assert looked[0] == len(x)
    assert 1 < looked[1] < 20
