"""Deployment over a real SSH server: only what was verified and signed goes, and the printed code runs there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rankship_benchmarks.verbs.deploy import write_snippet
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.formats import FORMATS
from rankship_targets.session.manifest import manifest_path


def deploy(build: Path, inventory: Path, store: Path, *flags: str) -> int:
    return main(
        ["deploy", str(build), "--on", "one, two", "--inventory", str(inventory), "--store", str(store), *flags]
    )


@pytest.mark.slow
def test_only_what_was_verified_is_deployed_and_the_printed_code_runs(
    shared_recipe: Path, shared_store: Path, inventory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(shared_recipe), "--store", str(shared_store)]) == 0
    for note in shared_store.glob(f"artifact-*/*{manifest_path(Path('x')).name[1:]}"):
        note.unlink()
    capsys.readouterr()
    assert deploy(shared_recipe, inventory, shared_store) == 4
    assert "ManifestRefused" in capsys.readouterr().err
    assert not list(tmp_path.glob("it's */artifacts"))

    assert main(["verify", str(shared_recipe), "--store", str(shared_store)]) == 0
    capsys.readouterr()
    assert deploy(shared_recipe, inventory, shared_store) == 0
    printed = capsys.readouterr().out
    for name in ("one", "two"):
        folder = tmp_path / f"it's {name}"
        deployed = sorted(path for path in folder.glob("artifacts/*/*") if not path.name.endswith(".json"))
        assert sorted(path.suffix for path in deployed) == [".onnx", ".pte", ".tflite"]
        for path in deployed:
            assert f"{name}: compressed" in printed
            assert str(path) in printed
            if path.suffix != ".pte":
                run_snippet(write_snippet("onnx" if path.suffix == ".onnx" else "tflite", str(path)), printed)

    artifact = next(path for path in shared_store.glob("artifact-*/model.onnx") if manifest_path(path).exists())
    assert deploy(artifact, inventory, shared_store, "--format", "onnx") == 0, "one verified file alone"
    assert deploy(artifact, inventory, shared_store, "--format", "tflite") == 2
    content = artifact.read_bytes()
    artifact.write_bytes(content + b"x")
    try:
        assert deploy(artifact, inventory, shared_store) == 4
    finally:
        artifact.write_bytes(content)


def run_snippet(code: str, printed: str) -> None:
    assert code in printed
    inputs = "import numpy\ninputs = [numpy.zeros((1, 1, 8, 8), numpy.float32)]\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{inputs}{code}\nprint('SHAPE', outputs[0].shape)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "SHAPE (1, 3)" in done.stdout, done.stderr


@pytest.mark.parametrize("path", ["/plain/model.pte", '/it\'s "quoted"\n/größe\\模型.pte'])
def test_paths_are_quoted_in_code(path: str) -> None:
    for name in FORMATS:
        code = write_snippet(name, path)
        assert (json.dumps(path, ensure_ascii=False) if name == "executorch" else repr(path)) in code
        if name != "executorch":
            compile(code, "snippet", "exec")
