"""One suite for every exporter: what goes in as a graph comes back as the same operators, and runs the same."""

import importlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.export import Expected, Exporter, Operator, check_factors, check_size, keep_stdout_clean
from rankship_pipeline.export.graph import expect_operators, trace_graph
from rankship_pipeline.foundation.errors import BuildError, InputError
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.records import Factors, LayerRank, RankPlan

MODULES: dict[str, str] = {str(name): facts.exporter for name, facts in FACTS.items()}
MODULES["fake"] = "rankship_pipeline.export.fake"


EXAMPLE = (torch.zeros(1, 3, 16, 16),)


class Net(nn.Module):
    """One of everything that is ever factored: a strided convolution with bias, a factored pair, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 3, 2, 1)
        self.pair = nn.Sequential(nn.Conv2d(8, 2, 3, 1, 1, bias=False), nn.Conv2d(2, 8, 1))
        self.linear_pair = nn.Sequential(nn.Linear(8, 3, bias=False), nn.Linear(3, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.pair(torch.relu(self.dense(x))))
        return torch.as_tensor(self.head(torch.relu(self.linear_pair(y.mean((2, 3))))))


class Odd(Net):
    """A net of which converters leave parts out: what is constant, what is unused, what is computed twice.

    Beside them stand a dense layer with the shape of a factored one, a weight that is computed from others, and factors
    of rank one, of one input channel and along one axis.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places, self.constant, self.unused = nn.Embedding(16, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.like_the_pair = nn.Conv2d(8, 8, 3, 1, 1)
        self.normalised = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))
        self.rank_one = nn.Sequential(nn.Linear(8, 1, bias=False), nn.Linear(1, 16))
        self.grey = nn.Sequential(nn.Conv2d(1, 2, (3, 1), (2, 1), (1, 0), bias=False), nn.Conv2d(2, 8, (1, 3), (1, 2)))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.like_the_pair(torch.relu(self.pair(torch.relu(self.dense(x))))))
        y = torch.relu(y.mean((2, 3)) + self.grey(x[:, :1]).mean((2, 3)))
        self.unused(self.linear_pair(y))
        constant = self.constant(self.places(torch.arange(16))).mean(0) + self.constant(torch.zeros_like(y))
        z = self.linear_pair(y) + torch.tanh(self.linear_pair(y)) + self.linear_pair(torch.tanh(y))
        return torch.as_tensor(self.head(z + constant + self.normalised(y) + self.rank_one(y)))


CHAINS = {
    "like_the_pair": nn.Sequential(nn.Conv2d(8, 2, 3, 1, 1, bias=False), nn.Conv2d(2, 8, 1)),
    "head": nn.Sequential(nn.Linear(16, 3, bias=False), nn.Linear(3, 5)),
}
# How often each shape is in a file: what is constant, unused or normalised not at all, the twofold computation once.
NEEDED = {
    (8, 27): 1, (2, 72): 1, (8, 2): 1, (8, 72): 1, (3, 8): 2, (16, 3): 2, (2, 3): 1, (8, 6): 1, (1, 8): 1, (16, 1): 1,
    (5, 16): 1,
}  # fmt: skip


def describe(name: str, rows: int, columns: int, rank: int | None) -> LayerRank:
    return LayerRank(
        name=name,
        rows=rows,
        columns=columns,
        factors=None if rank is None else Factors(rank=rank),
        operators=((rows, columns),) if rank is None else ((rank, columns), (rows, rank)),
        dense_parameters=rows * columns,
        chosen_parameters=rows * columns if rank is None else rank * (rows + columns),
        relative_error=0.0,
        interference=None,
    )


PLAN = RankPlan(
    method="uniform",
    layers=(describe("dense", 8, 27, None), describe("pair", 8, 72, 2), describe("linear_pair", 16, 8, 3)),
    fixed_parameters=0,
    total_parameters=0,
    unit="parameters",
    total_cost=0,
    budget_cost=0,
    predicted_error=0.0,
)


@pytest.fixture(scope="module", params=sorted(MODULES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Exporter, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / f"model.{request.param}"
    with keep_stdout_clean():
        exporter: Exporter = importlib.import_module(MODULES[request.param])
        exporter.export_graph(trace_graph(Odd().eval(), EXAMPLE), path)
    return exporter, path


@cache
def expect_of_odd() -> Expected:
    return expect_operators(trace_graph(Odd().eval(), EXAMPLE))


@cache
def expect_of_odd_with_chain(name: str) -> Expected:
    net = Odd().eval()
    setattr(net, name, CHAINS[name])
    return expect_operators(trace_graph(net, EXAMPLE))


def count(operators: tuple[Operator, ...]) -> Counter[tuple[int, int]]:
    return Counter((one.rows, one.columns) for one in operators)


def test_what_converters_fold_or_drop_is_no_factor_multiplied_out(exported: tuple[Exporter, Path]) -> None:
    exporter, path = exported
    expected, found = expect_of_odd(), exporter.list_operators(path)
    assert count(expected.needed) == Counter(NEEDED)
    assert not Counter(NEEDED) - count(found)
    assert not count(found) - count(expected.allowed)
    check_factors(PLAN, expected, found, where="test")


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_that_an_exporter_multiplies_out_is_found(exported: tuple[Exporter, Path], name: str) -> None:
    """The file holds the layer dense that the graph has as a chain."""
    exporter, path = exported
    rows, columns, rank = {"like_the_pair": (8, 72, 2), "head": (5, 16, 3)}[name]
    plan = replace(PLAN, layers=(*PLAN.layers, describe(name, rows, columns, rank)))
    message = rf"  {name}: \d operators of shape {rank}x{columns}, \d expected[\s\S]*  {name}: one dense operator"
    with pytest.raises(BuildError, match=message):
        check_factors(plan, expect_of_odd_with_chain(name), exporter.list_operators(path), where="test")


SHAPES = ((8, 27), (2, 72), (8, 2), (3, 8), (16, 3), (5, 16))


def expect(*shapes: tuple[int, int]) -> Expected:
    return Expected(needed=make_operators(*shapes), allowed=make_operators(*shapes))


def make_operators(*shapes: tuple[int, int]) -> tuple[Operator, ...]:
    return tuple(Operator(kind="any", rows=rows, columns=columns) for rows, columns in shapes)


def test_a_factor_folded_back_is_named() -> None:
    folded = make_operators((8, 27), (8, 72), (3, 8), (16, 3), (5, 16))
    message = r"pair: 0 operators of shape 2x72, 1 expected[\s\S]*pair: one dense operator in the file, 8x72"
    with pytest.raises(BuildError, match=message):
        check_factors(PLAN, expect(*SHAPES), folded, where="test")


def test_a_dense_layer_of_the_same_shape_is_no_folded_factor() -> None:
    """An excluded, tied or grouped layer may have the shape of a factored one; the graph knows of it."""
    check_factors(PLAN, expect(*SHAPES, (8, 72)), make_operators(*SHAPES, (8, 72)), where="test")


def test_the_check_counts_repeated_shapes() -> None:
    twice = ((2, 72), (8, 2), (2, 72), (8, 2))
    with pytest.raises(BuildError, match="1 operators of shape 2x72, 2 expected"):
        check_factors(PLAN, expect(*twice), make_operators(*twice[:2]), where="test")


@pytest.mark.parametrize(("name", "held"), [("onnx", False), ("tflite", False), ("executorch", True)])
def test_weights_beyond_two_gigabytes_are_refused_where_a_file_cannot_hold_them(name: Format, *, held: bool) -> None:
    weight = torch.zeros(1).expand(2**29)  # 2 GiB that take no memory
    check_size([weight[: 2**28], weight[: 2**28]], name)  # tied: counted once
    with nullcontext() if held else pytest.raises(InputError, match=r"take 2.1 GB, a file of \w+ holds at most 2.1 GB"):
        check_size([weight], name)


def test_files_tell_nothing_of_the_machine_that_made_them(exported: tuple[Exporter, Path]) -> None:
    _, path = exported
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path.home()).encode() + b"/" not in content
    assert str(Path(__file__).parent).encode() not in content
