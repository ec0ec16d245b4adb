"""One suite for every exporter: what goes in as a graph comes back as the same operators, and runs the same."""

import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.export import Exporter, Operator, check_factors, keep_stdout_clean
from rankship_pipeline.export.graph import list_graph_operators
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.formats import FACTS
from rankship_pipeline.foundation.records import Factors, LayerRank, RankPlan

MODULES: dict[str, str] = {str(name): facts.exporter for name, facts in FACTS.items()}
MODULES["fake"] = "rankship_pipeline.export.fake"


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


PLAN = RankPlan(
    method="uniform",
    layers=tuple(
        LayerRank(
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
        for name, rows, columns, rank in (
            ("dense", 8, 27, None),
            ("pair", 8, 72, 2),
            ("linear_pair", 16, 8, 3),
            ("head", 5, 16, None),
        )
    ),
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
        exporter.export_graph(torch.export.export(Net().eval(), (torch.zeros(1, 3, 16, 16),)), path)
    return exporter, path


def test_every_weighted_operator_is_read_back_as_its_matrix(exported: tuple[Exporter, Path]) -> None:
    exporter, path = exported
    found = Counter((operator.rows, operator.columns) for operator in exporter.list_operators(path))
    assert found == Counter([(8, 27), (2, 72), (8, 2), (3, 8), (16, 3), (5, 16)])


def make_operators(*shapes: tuple[int, int]) -> tuple[Operator, ...]:
    return tuple(Operator(kind="any", rows=rows, columns=columns) for rows, columns in shapes)


def test_the_graph_lists_the_same_operators_as_the_file(exported: tuple[Exporter, Path]) -> None:
    exporter, path = exported
    graph = torch.export.export(Net().eval(), (torch.zeros(1, 3, 16, 16),))
    check_factors(PLAN, list_graph_operators(graph), exporter.list_operators(path), where="test")


EXPECTED = make_operators((8, 27), (2, 72), (8, 2), (3, 8), (16, 3), (5, 16))


def test_a_factor_folded_back_is_named() -> None:
    folded = make_operators((8, 27), (8, 72), (3, 8), (16, 3), (5, 16))
    message = r"pair: 0 operators of shape 2x72, 1 expected[\s\S]*pair: one dense operator in the file, 8x72"
    with pytest.raises(BuildError, match=message):
        check_factors(PLAN, EXPECTED, folded, where="test")


def test_a_dense_layer_of_the_same_shape_is_no_folded_factor() -> None:
    """An excluded, tied or grouped layer may have the shape of a factored one; the graph knows of it."""
    check_factors(PLAN, (*EXPECTED, *make_operators((8, 72))), (*EXPECTED, *make_operators((8, 72))), where="test")


def test_the_check_counts_repeated_shapes() -> None:
    twice = make_operators((2, 72), (8, 2), (2, 72), (8, 2))
    with pytest.raises(BuildError, match="1 operators of shape 2x72, 2 expected"):
        check_factors(PLAN, twice, twice[:2], where="test")


def test_files_tell_nothing_of_the_machine_that_made_them(exported: tuple[Exporter, Path]) -> None:
    _, path = exported
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path.home()).encode() + b"/" not in content
    assert str(Path(__file__).parent).encode() not in content
