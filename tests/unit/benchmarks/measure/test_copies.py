from dataclasses import replace
from pathlib import Path

from make.artifacts import COMPRESSED, make_artifact
from make.builds import make_build
from make.token_files import GENERATION
from rankship_benchmarks.measure.copies import name_copies, write_copies
from rankship_pipeline.foundation.artifact_key import head_of
from rankship_pipeline.foundation.store import Store
from rankship_targets.session.manifest import manifest_path


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


def test_a_file_that_generates_has_a_folder_with_what_runs_it(tmp_path: Path) -> None:
    entry = tmp_path / "store/artifact-1"
    entry.mkdir(parents=True)
    for name in ("model.onnx", "genai_config.json", "tokenizer.json", "expected.0.npy"):
        (entry / name).write_text(name)
    manifest_path(entry / "model.onnx").write_text("signed")
    artifact = replace(make_artifact(COMPRESSED, file="artifact-1/model.onnx"), generation=GENERATION)
    build = make_build(artifact)
    written = write_copies(build, (), Store(tmp_path / "store"), tmp_path / "to")
    folder = tmp_path / "to/compressed-onnx"
    assert written[0] == folder / "model.onnx"
    copied = {one.name for one in folder.iterdir()}
    assert copied == {"model.onnx", "genai_config.json", "tokenizer.json", manifest_path(written[0]).name}
