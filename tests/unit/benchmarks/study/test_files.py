"""Small files of a net of a few numbers: made once, run in their runtime, drawn and summed up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from make.recipes import LITTLE_DATA, state_model, state_rest
from rankship_benchmarks.study import files as files_room
from rankship_benchmarks.study.choices import read_study
from rankship_benchmarks.study.files import FILES, FileCell, find_file, read_files, run_files
from rankship_benchmarks.study.toolchains import TOOLCHAINS
from rankship_benchmarks.verbs import run
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
"""
RECIPE = 'name = "net"\n' + state_model("net", train="net.py:train") + state_rest(0.8)
PARAMETERS = 9_115
ROW = "[[rows]]\nway = { name = 'u', merge = 'average', ranks = 'uniform', whitening = 'plain' }"
STUDY = """
name = "tiny"
rounds = 1
[[subjects]]
recipe = "recipe.toml"
smaller = [6]
[[files]]
name = "dense float32"
ranks = false
[[files]]
name = "dense int8"
toolchain = "onnxruntime"
[[files]]
name = "a peer"
toolchain = "nncf"
[[files]]
name = "mixed"
weights = ["int8", "int4"]
activations = "float32"
ranks = false
[[files]]
name = "ours"
weights = ["int8", "int4"]
activations = "float32"
ours = true
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TOOLCHAINS, "nncf", replace(TOOLCHAINS["nncf"], distribution="rankship-lacks-this"))
    (tmp_path / "net.py").write_text(NET + LITTLE_DATA)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


@pytest.mark.slow
def test_files_are_made_once_and_scored_by_what_they_answer(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [str(folder / "study.toml"), "--results", str(folder), "--store", str(folder / "store")]
    assert run.study(asked) == 0
    said, results = capsys.readouterr(), folder / "study-tiny"
    assert "no a peer: rankship-lacks-this is not installed" in said.err
    assert "→ ours" in said.out
    cells = read_files(results)
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
            assert cell.weight_bytes == cell.plan.total_cost <= 4 * PARAMETERS / cell.smaller
            assert cell.cpu_seconds > 0
    dense, rounded, *chosen = cells
    assert dense.accuracy.correct == dense.dense.correct
    assert dense.size_bytes == dense.dense_bytes
    assert dense.weight_bytes == 4 * PARAMETERS
    assert rounded.size_bytes < dense.size_bytes
    assert rounded.conditions["version onnxruntime"]
    assert {cell.precision for cell in chosen} == {"int4"}
    mixed = [cell.plan for cell in chosen if cell.row == "mixed" and cell.plan]
    assert all(layer.factors is None for plan in mixed for layer in plan.layers)
    check_page(results, cells)
    monkeypatch.setattr(files_room._Bench, "try_row", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(HostRunner, "time", lambda *_: pytest.fail("timed again"))
    assert run.study(asked) == 0
    assert read_files(results) == cells


def check_page(results: Path, cells: list[FileCell]) -> None:
    """The page and the summary of these cells."""
    page = (results / "study.html").read_text()
    assert page.count("<svg") == 2
    assert "fewest bits: int8" in page
    assert "Ranks and bits of ours" in page
    ours = [cell.plan for cell in cells if cell.row == "ours" and cell.plan]
    for layer in ours[0].layers:
        assert f"<td>{layer.stored}</td>" in page
    lines = json.loads((results / "summary.json").read_text())["lines"]
    assert [one["size_bytes"] for one in lines] == [cell.size_bytes for cell in cells]
    assert all(one["latency_ns"]["rounds"] == 1 and not one["cells"] for one in lines)


def test_a_file_that_is_gone_is_made_again(folder: Path) -> None:
    study = read_study(folder / "study.toml")
    study = replace(study, files=study.files[:1])
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
