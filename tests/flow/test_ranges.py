"""Ranges of lengths from Python: one file where the format takes them, else a file for each shape, all proven."""

from pathlib import Path

import torch
from torch import nn

import rankship as rs


def test_a_batch_is_a_range_in_one_file_or_a_file_for_each_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    small = rs.compress(model, torch.randn(60, 20), kept_parameters=0.8, store=tmp_path / "store", progress=False)
    built = rs.export(small, tmp_path / "out", formats=["onnx", "tflite"], batch=(1, 2), progress=False)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*") if path.suffix in {".onnx", ".tflite"}) == [
        "compressed-batch-2.tflite",
        "compressed.onnx",
        "compressed.tflite",
        "dense-batch-2.tflite",
        "dense.onnx",
        "dense.tflite",
    ]
    assert [one.key.title for one in built.build.shapes] == ["dense tflite, batch 2", "compressed tflite, batch 2"]
    assert [one.inputs[0].shape for one in built.build.shapes] == [(2, 20)] * 2
    assert {len(one.dimensions) for one in built.build.artifacts if one.key.format == "onnx"} == {1}
    assert len(built.verified) == len(built.build.files) == 6
    assert all(one.max_relative_error < 1e-4 for one in built.verified)
    report = built.report()
    assert "onnx: every file takes batch 1 to 2, and is timed with batch 1" in report
    assert "tflite: a file takes one shape, so there are files for batch 2 beside" in report
