"""One suite for every exporter: what goes in as a graph comes back as the same operators, and runs the same."""

import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.errors import BuildError
from rankship_pipeline.export import EXPORTERS, Exporter, Operator, check_factors, keep_stdout_clean
from rankship_pipeline.records import LayerRank, RankPlan

MODULES: dict[str, str] = {str(name): module for name, (module, _, _) in EXPORTERS.items()}
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
            rank=rank,
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
    budget_parameters=0,
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


def test_factored_layers_pass_the_check(exported: tuple[Exporter, Path]) -> None:
    exporter, path = exported
    check_factors(PLAN, exporter.list_operators(path), where="test")


def test_a_factor_folded_back_is_named() -> None:
    folded = tuple(Operator(kind="x", rows=r, columns=c) for r, c in ((8, 27), (8, 72), (3, 8), (16, 3), (5, 16)))
    with pytest.raises(BuildError, match=r"pair: no operator of shape 2x72[\s\S]*1 undivided operators of shape 8x72"):
        check_factors(PLAN, folded, where="test")


def test_the_check_counts_repeated_shapes() -> None:
    one = tuple(Operator(kind="x", rows=r, columns=c) for r, c in ((2, 72), (8, 2)))
    twice = RankPlan(
        method="uniform",
        layers=(PLAN.layers[1], PLAN.layers[1]),
        fixed_parameters=0,
        total_parameters=0,
        budget_parameters=0,
        predicted_error=0.0,
    )
    with pytest.raises(BuildError, match="no operator"):
        check_factors(twice, one, where="test")


def test_files_tell_nothing_of_the_machine_that_made_them(exported: tuple[Exporter, Path]) -> None:
    _, path = exported
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path.home()).encode() + b"/" not in content
    assert str(Path(__file__).parent).encode() not in content
