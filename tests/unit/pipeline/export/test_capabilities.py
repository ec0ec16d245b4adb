"""The table of what formats run says what was measured."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from rankship_pipeline.export.capabilities import RUNS, Kind, list_offered
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.recipe.precision import Activations

CELLS: list[dict[str, Any]] = json.loads(Path("benchmarks/baselines/capabilities.json").read_text())
_KINDS: dict[str, Kind] = {
    "linear": "linear",
    "linear pair of 64": "linear",
    "convolution 3x3": "convolution",
    "convolution 1x1": "convolution",
    "spatial pair": "convolution",
    "tucker": "convolution",
    "depthwise": "convolution",
    "embedding": "embedding",
}
TRIED = [key for key in RUNS if (key[0], key[2]) != ("tflite", "static")]  # its converter takes another graph


def is_right(cell: dict[str, Any]) -> bool:
    return bool(cell["builds"] and cell["runs"] and cell["chosen_integers"] is True and cell["error"] < 0.03)


@pytest.mark.parametrize("key", TRIED, ids=" ".join)
def test_what_is_offered_was_right_and_not_slow_wherever_it_was_tried(key: tuple[Format, Kind, Activations]) -> None:
    _, kind, _ = key
    found = [
        cell
        for cell in CELLS
        if (cell["format"], _KINDS.get(cell["operator"]), cell["activations"]) == key and cell["precision"] in RUNS[key]
    ]
    assert found
    assert all(is_right(cell) for cell in found)
    limit = 2.5 if kind == "embedding" else 1.6  # of microseconds; and of figures from a busy machine
    assert all(cell["time_ratio"][0] < limit for cell in found)


def test_what_is_wrong_or_refused_is_not_offered() -> None:
    wrong = [
        cell for cell in CELLS if cell["operator"] in _KINDS and cell["activations"] != "static" and not is_right(cell)
    ]
    assert {(cell["format"], cell["activations"]) for cell in wrong} >= {("executorch", "float32")}
    for cell in wrong:
        offered = RUNS.get((cell["format"], _KINDS[cell["operator"]], cell["activations"]), ())
        assert cell["precision"] not in offered, cell


def test_every_format_was_tried() -> None:
    assert {cell["format"] for cell in CELLS} == set(get_args(Format))


def test_what_several_formats_offer_is_what_each_of_them_runs() -> None:
    every = list_offered(("onnx", "tflite", "executorch"), "dynamic")
    assert every.kinds["int8"] == {"linear", "embedding"}, "ExecuTorch has no convolutions with dynamic activations"
    assert list_offered(("onnx", "tflite"), "dynamic").kinds["int8"] == {"linear", "convolution", "embedding"}
    assert "transposed convolution" in every.kinds["float32"]
    assert list_offered(("tflite",), "static").kinds["int4"] == frozenset()
    assert every.allows("linear", 64, "int4")
    assert not every.allows("linear", 48, "int4"), "no whole blocks"
