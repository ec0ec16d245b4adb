"""A study end to end on a net of a few numbers: every cell once, kept at once, drawn and summed up."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from make.recipes import LITTLE_DATA, state_model, state_rest
from rankship_benchmarks.study import study as study_room
from rankship_benchmarks.study.choices import Row, Study, read_study
from rankship_benchmarks.study.lines import summarise_cells
from rankship_benchmarks.study.page import print_cells, write_page, write_summary
from rankship_benchmarks.study.study import CELLS, Cell, read_cells, run_study
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.store import Store

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
"""
RECIPE = 'name = "net"\n' + state_model("net", train="net.py:train") + state_rest(0.8)
STUDY = """
name = "tiny"
seeds = [0, 1]
[[subjects]]
recipe = "recipe.toml"
kept = [0.8, 0.6]
[[rows]]
way = { name = "uniform", merge = "average", ranks = "uniform", whitening = "plain" }
[[rows]]
ours = true
refine_cpu_seconds = 0.2
refine_at = [0.6]
way = { name = "ours", merge = "average", ranks = "knapsack", whitening = "eigen" }
"""


HEADS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(classes)
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))

def two():
    return Net(2)

def three():
    return Net(3)

def train(model, seed):
    pass

def load():
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tests = {"two": (x, two()(x).argmax(1)), "three": (x[:40], three()(x[:40]).argmax(1))}
    return {"calibration": {"two": x, "three": x}, "tests": tests}
"""
HEADS_MODELS = "".join(state_model(name, f"heads.py:{name}", train="heads.py:train") for name in ("two", "three"))
HEADS_RECIPE = f'name = "heads"\n{HEADS_MODELS}[merge]\nhead = "head"\n{state_rest(0.8, "heads.py:load")}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET + LITTLE_DATA)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


def compute(folder: Path, study: Study | None = None) -> list[Cell]:
    study = study or read_study(folder / "study.toml")
    return run_study(study, folder, folder / "results", Store(folder / "store"), Steps(quiet=True))


def name_cells(cells: Sequence[Cell]) -> list[tuple[int, float, str, float]]:
    return [(cell.seed, cell.kept, cell.row, cell.refine_cpu_seconds) for cell in cells]


def test_every_cell_is_there_once_and_never_over_its_budget(folder: Path) -> None:
    cells = compute(folder)
    per_seed = [
        (0.8, "uniform", 0.0),
        (0.8, "ours", 0.0),
        (0.6, "uniform", 0.0),
        (0.6, "ours", 0.0),
        (0.6, "ours", 0.2),
    ]
    assert name_cells(cells) == [(seed, *one) for seed in (0, 1) for one in per_seed]
    for cell in cells:
        assert cell.plan.total_cost <= cell.plan.budget_cost == int(cell.kept * cell.dense_parameters)
        assert cell.size_bytes == 4 * cell.plan.total_parameters
        assert cell.cpu_seconds >= cell.refine_cpu_seconds
        assert cell.peak_bytes > 0
    assert read_cells(folder / "results") == cells
    refined = [cell.accuracy.cross_entropy for cell in cells if cell.kept == 0.6 and cell.row == "ours"]
    assert refined[0] != refined[1]


def test_a_second_run_computes_nothing_and_a_new_row_only_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = compute(folder)
    study = read_study(folder / "study.toml")
    wider = replace(study, rows=(*study.rows, Row(way=replace(study.rows[0].way, name="whitened", whitening="eigen"))))
    measured: list[str] = []
    measure = study_room._Bench.measure

    def count(bench: Any, key: str, *rest: Any) -> Cell:  # noqa: ANN401
        measured.append(key)
        cell: Cell = measure(bench, key, *rest)
        return cell

    monkeypatch.setattr(study_room._Bench, "measure", count)
    assert compute(folder) == cells
    assert measured == []
    assert len(compute(folder, wider)) == len(cells) + 4
    assert len(measured) == 4


def test_a_merge_is_tested_by_task_beside_its_specialists(folder: Path) -> None:
    (folder / "heads.py").write_text(HEADS)
    (folder / "recipe.toml").write_text(HEADS_RECIPE)
    (folder / "study.toml").write_text(
        STUDY.replace('merge = "average", ranks = "knapsack"', 'merge = "joint", ranks = "knapsack"')
    )
    study = replace(read_study(folder / "study.toml"), seeds=(0,))
    cells = compute(folder, study)
    for cell in cells:
        assert [(one.stage, one.samples) for one in cell.tasks] == [("two", 60), ("three", 40)]
        assert cell.accuracy.samples == 100
        assert cell.accuracy.correct == sum(one.correct or 0 for one in cell.tasks)
        assert [(one.stage, one.correct) for one in cell.specialists] == [("two", 60), ("three", 40)]
    line = summarise_cells(cells)[0]
    assert line.specialists == {"two": 100, "three": 100}
    assert line.tasks["three"] == 100 * cells[0].tasks[1].value
    page = write_page("tiny", cells, folder).read_text()
    assert "two 100.00, three 100.00 %, mean 100.00 %" in page
    assert "<th>two / three</th>" in page


def test_a_torn_last_line_is_computed_again(folder: Path) -> None:
    cells = compute(folder)
    path = folder / "results" / CELLS
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert len(read_cells(folder / "results")) == len(cells) - 1
    assert name_cells(compute(folder)) == name_cells(cells)
    assert path.read_bytes().count(b"\n") == len(cells)


def test_a_model_that_cannot_be_made_is_skipped_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.toml").write_text(RECIPE.replace("net.py:load", "net.py:lead"))
    study = read_study(folder / "study.toml")
    assert run_study(study, folder, folder / "results", Store(folder / "store"), Steps()) == []
    assert "skipped recipe.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ('of = "everything"', "of = 'everything'"),
        ('augment = "mixup"', r"augment: .*'mixup'"),
        ("zzzz = 1", "unknown key"),
    ],
)
def test_a_wrong_subject_is_refused(folder: Path, change: str, complaint: str) -> None:
    (folder / "study.toml").write_text(STUDY.replace("kept = [0.8, 0.6]", f"kept = [0.8, 0.6]\n{change}"))
    with pytest.raises(InputError, match=complaint):
        read_study(folder / "study.toml")


def test_a_wrong_row_is_refused_by_its_name(folder: Path) -> None:
    wrong = STUDY.replace('"knapsack", whitening = "eigen"', '"knapsack", whitening = "plain", reconstruct = true')
    (folder / "study.toml").write_text(wrong)
    with pytest.raises(InputError, match="row 'ours': reconstruct needs a whitening"):
        read_study(folder / "study.toml")


def test_lines_gather_seeds_and_the_summary_and_page_say_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    cells = compute(folder)
    lines = summarise_cells(cells)
    assert [(line.name, line.kept, line.seeds) for line in lines] == [
        ("uniform", 0.8, 2),
        ("ours", 0.8, 2),
        ("uniform", 0.6, 2),
        ("ours", 0.6, 2),
        ("ours + refined", 0.6, 2),
    ]
    for line in lines:
        values = [100 * cell.accuracy.value for cell in line.cells]
        assert (line.low, line.high) == (min(values), max(values))
        assert line.low <= line.quality <= line.high
    kept = json.loads(write_summary("tiny", cells, folder).read_text())
    assert [line["quality"] for line in kept["lines"]] == [line.quality for line in lines]
    assert kept["conditions"]["threads"] == "1"
    page = write_page("tiny", cells, folder).read_text()
    assert page.count("<svg") == 3
    for line in lines:
        assert f">{line.name}</th>" in page
    print_cells(cells, Console(width=120))
    assert "→ ours" in capsys.readouterr().out
