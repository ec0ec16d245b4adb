"""Small files of a net of a few numbers: made once, run in their runtime, drawn and summed up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from make.recipes import state_model, state_rest
from rankship_benchmarks.study import files as files_room
from rankship_benchmarks.study.choices import FileRow, Study, Subject, read_study
from rankship_benchmarks.study.file_lines import summarise_files
from rankship_benchmarks.study.file_page import print_files, write_files
from rankship_benchmarks.study.files import FILES, FileCell, find_file, read_files, run_files
from rankship_benchmarks.study.times import time_files
from rankship_benchmarks.study.toolchains import TOOLCHAINS
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.store import Store
from rankship_targets.session.runner import HostRunner

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 64), nn.ReLU(), nn.Linear(64, 3),
    )

def train(model, seed):
    pass

def load(seed=0):
    images = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:30]
    return {
        "calibration": {"net": images[chosen]}, "unlabelled": {"net": images},
        "test_inputs": images, "test_labels": torch.arange(60) % 3,
    }
"""
RECIPE = 'name = "net"\n' + state_model("net", train="net.py:train") + state_rest(0.8)
ROW = "[[rows]]\nway = { name = 'u', merge = 'average', ranks = 'uniform', whitening = 'plain' }"
STUDY = Study(
    name="tiny",
    subjects=(Subject(recipe="recipe.toml", smaller=(6.0,)),),
    files=(
        FileRow(name="dense float32", ranks=False),
        FileRow(name="dense int8", toolchain="onnxruntime"),
        FileRow(name="a peer", toolchain="nncf"),
        FileRow(name="mixed", weights=("int8", "int4"), activations="float32", ranks=False),
        FileRow(name="ours", weights=("int8", "int4"), activations="float32", ours=True),
    ),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TOOLCHAINS, "nncf", replace(TOOLCHAINS["nncf"], distribution="rankship-lacks-this"))
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def make_files(folder: Path) -> list[FileCell]:
    return run_files(STUDY, folder, folder / "results", Store(folder / "store"), Steps(), HostRunner())


@pytest.mark.slow
def test_files_are_made_once_and_scored_by_what_they_answer(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = make_files(folder)
    results = folder / "results"
    assert "no a peer: rankship-lacks-this is not installed" in capsys.readouterr().err
    assert [(cell.row, cell.smaller) for cell in cells] == [
        ("dense float32", None),
        ("dense int8", None),
        ("mixed", 6.0),
        ("ours", 6.0),
    ]
    for cell in cells:
        assert cell.sha256 == hash_file(find_file(cell, results))
        assert cell.size_bytes == find_file(cell, results).stat().st_size
        assert cell.accuracy.samples == 60
        if cell.plan and cell.smaller and cell.weight_bytes:
            assert cell.weight_bytes == cell.plan.total_cost <= 4 * 11_659 / cell.smaller
            assert cell.cpu_seconds > 0
    dense, rounded, *chosen = cells
    assert dense.accuracy.correct == dense.dense.correct
    assert dense.size_bytes == dense.dense_bytes
    assert rounded.size_bytes < dense.size_bytes
    assert rounded.conditions["version onnxruntime"]
    assert {cell.precision for cell in chosen} == {"int4"}
    mixed = [cell.plan for cell in chosen if cell.row == "mixed" and cell.plan]
    assert all(layer.factors is None for plan in mixed for layer in plan.layers)
    monkeypatch.setattr(files_room._Bench, "try_row", lambda *_: pytest.fail("made again"))
    assert make_files(folder) == cells == read_files(results)
    capsys.readouterr()
    check_shown(folder, cells, capsys)


def check_shown(folder: Path, cells: list[FileCell], capsys: pytest.CaptureFixture[str]) -> None:
    """The table, the page and the summary of these cells."""
    from rich.console import Console

    results = folder / "results"
    steps = Steps(quiet=True)
    latency = time_files(cells, results, steps, rounds=1, threads=1)
    assert {cell.sha256 for cell in cells} == set(latency)
    assert latency == time_files(cells, results, steps, rounds=1, threads=1)
    assert time_files(cells, results, steps, rounds=0, threads=1) == {}
    lines = summarise_files(cells, latency)
    page = write_files("tiny", lines, results).read_text()
    assert page.count("<svg") == 2
    assert "fewest bits: int8" in page
    assert "Ranks and bits of ours" in page
    ours = [cell.plan for cell in cells if cell.row == "ours" and cell.plan]
    for layer in ours[0].layers:
        assert f"<td>{layer.stored}</td>" in page
    kept = json.loads((results / "summary.json").read_text())
    assert [one["size_bytes"] for one in kept["lines"]] == [line.size_bytes for line in lines]
    assert all(not one["cells"] for one in kept["lines"])
    print_files(lines, Console(width=160))
    assert "→ ours" in capsys.readouterr().out


def test_a_file_that_is_gone_is_made_again(folder: Path) -> None:
    study = Study(name="tiny", subjects=STUDY.subjects, files=STUDY.files[:1])
    results, store = folder / "results", Store(folder / "store")
    (cell,) = run_files(study, folder, results, store, Steps(quiet=True), HostRunner())
    find_file(cell, results).unlink()
    (again,) = run_files(study, folder, results, store, Steps(quiet=True), HostRunner())
    assert again.sha256 == cell.sha256
    assert find_file(cell, results).is_file()
    assert (results / FILES).read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (f"[[files]]\nname = 'a'\n{ROW}", "one of the two"),
        ("", "one of the two"),
        ("[[files]]\nname = 'a'\ntoolchain = 'tool'", "toolchain = 'tool', it is one of onnxruntime"),
        ("[[files]]\nname = 'a'\ntoolchain = 'pt2e'", "pt2e writes executorch"),
        ("[[files]]\nname = 'a'\nweights = []", "weights is empty"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "s.toml").write_text(f'name = "s"\n[[subjects]]\nrecipe = "r.toml"\nsmaller = [4]\n{text}\n')
    with pytest.raises(InputError, match=complaint):
        read_study(tmp_path / "s.toml")


def test_a_subject_needs_sizes_for_files(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('name = "s"\n[[subjects]]\nrecipe = "r"\nkept = [0.5]\n[[files]]\nname = "a"\n')
    with pytest.raises(InputError, match="need smaller"):
        read_study(tmp_path / "s.toml")
