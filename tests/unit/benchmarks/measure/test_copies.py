from dataclasses import replace

from make.artifacts import COMPRESSED, make_artifact
from make.builds import make_build
from rankship_benchmarks.measure.copies import name_copies
from rankship_pipeline.foundation.artifact_key import head_of


def test_no_two_copies_have_one_name() -> None:
    heads = [
        make_artifact(replace(COMPRESSED, part=head_of(task)), file=f"{number}/head.onnx")
        for number, task in enumerate(("a b", "a-b", "A B"))
    ]
    build = replace(make_build(make_artifact(COMPRESSED, file="whole.onnx")), heads=tuple(heads))
    assert name_copies(build) == {
        "whole.onnx": "compressed.onnx",
        "0/head.onnx": "compressed-head-of-a-b.onnx",
        "1/head.onnx": "compressed-head-of-a-b-2.onnx",
        "2/head.onnx": "compressed-head-of-A-B-3.onnx",
    }
