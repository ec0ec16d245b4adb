"""The whole main job: in a process of its own, killed and begun again; and what its store holds and finds."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.artifact_key import VARIANTS
from rankship_pipeline.foundation.formats import FORMATS
from rankship_pipeline.foundation.store import MANIFEST, Store
from rankship_pipeline.verbs import find_by_name

pytestmark = pytest.mark.slow
ROUNDS, CASES = 6, 2  # what `run` measures by default; dense and compressed


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "rankship_pipeline.cli", *map(str, arguments)]


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "XDG_CONFIG_HOME": str(folder / "config")}


def _run_command(recipe: Path, folder: Path) -> list[str]:
    return _command("run", recipe, "--on", "this-machine", "--store", folder / "store", "--results", folder / "results")


def _check_store(root: Path) -> int:
    """Read every published folder in full; gives how many there are."""
    folders = [path for path in root.glob("*") if not path.name.startswith(".")]
    for folder in folders:
        entry = Store(root).open(folder)
        for name in entry.files:
            entry.read(name)
        assert (folder / MANIFEST).is_file()
    return len(folders)


def _start(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        _run_command(recipe, folder),
        env=_environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_a_run_killed_at_five_random_moments_goes_on_and_loses_nothing(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + '\n[export]\nformats = ["onnx"]\n')
    moments = random.Random(20261123)  # noqa: S311 - not for secrets
    entries = trials = kills = 0
    while kills < 5:
        process = _start(recipe, tmp_path)
        try:
            process.wait(timeout=moments.uniform(2, 8))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        else:
            break  # a fast machine was through before the next kill
        kills += 1
        found = _check_store(tmp_path / "store") if (tmp_path / "store").exists() else 0
        kept = [len(open_bundle(folder).trials) for folder in (tmp_path / "results").glob("[!.]*")]
        assert found >= entries
        assert len(kept) <= 1
        assert sum(kept) >= trials
        entries, trials = found, sum(kept)
    assert kills > 0
    if kills == 5:
        assert _start(recipe, tmp_path).wait() == 0
    (folder,) = (tmp_path / "results").glob("[!.]*")
    bundle = open_bundle(folder)
    cases = Counter((trial.round, trial.key) for trial in bundle.trials)
    assert bundle.finished
    assert len(cases) == ROUNDS * (CASES + 1)  # and the canary
    assert set(cases.values()) == {1}
    assert (folder / "report.html").stat().st_size > 10_000
    shown = subprocess.run(
        _command("report", folder), env=_environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert "vs dense" in shown.stdout
    assert "No energy figure" in shown.stdout


def test_verify_finds_a_file_changed_after_the_build_and_names_it(
    shared_recipe: Path,
    shared_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["build", str(shared_recipe), "--store", str(shared_store)]) == 0
    store = shutil.copytree(shared_store, tmp_path / "store")
    flags = [str(shared_recipe), "--store", str(store)]
    assert main(["show", *flags]) == 0
    assert "tiny" in capsys.readouterr().out
    victim = next(path for path in store.glob("artifact-*/model.tflite"))
    victim.write_bytes(victim.read_bytes()[:-100])
    assert main(["verify", *flags]) == 3
    assert "tflite (model.tflite) is not the file that was built" in capsys.readouterr().err
    assert main(["run", *flags, "--on", "this-machine", "--results", str(tmp_path / "results")]) == 3
    assert not list((tmp_path / "cache").rglob("artifacts/*")), "nothing unverified may be pushed"


def test_build_records_say_what_made_them(shared_recipe: Path, shared_store: Path) -> None:
    assert main(["build", str(shared_recipe), "--store", str(shared_store)]) == 0
    build, _ = find_by_name(str(shared_recipe), Store(shared_store))
    records = [json.loads((shared_store / one.file).with_name("artifact.json").read_text()) for one in build.artifacts]
    assert len(records) == len(VARIANTS) * len(FORMATS)
    for record in records:
        assert set(record["source_sha256"]) == {"a", "b"}
        assert record["toolchain"]["torch"].startswith("2.")
        (taken,) = record["inputs"]
        assert (taken["name"], taken["shape"], taken["dtype"]) == ("input.0", [1, 1, 8, 8], "float32")
        assert record["outputs"][0]["shape"] == [1, 3]
        assert bool(record["factored_layers"]) == (record["key"]["variant"] == "compressed")


def test_a_change_of_the_model_s_code_alone_is_built_anew(recipe: Path, tmp_path: Path) -> None:
    """Another operator without weights leaves every tensor as it was, and still makes another model."""
    recipe.write_text(recipe.read_text() + '\n[export]\nformats = ["onnx"]\n')
    store, code = tmp_path / "store", recipe.with_name("model.py")
    texts = [code.read_text(), code.read_text().replace("nn.ReLU(), nn.Flatten()", "nn.Tanh(), nn.Flatten()")]
    counts = []
    for text in texts:
        code.write_text(text)
        assert main(["build", str(recipe), "--store", str(store)]) == 0
        counts.append(sorted(b"Tanh" in path.read_bytes() for path in store.glob("artifact-*/model.onnx")))
    assert counts == [[False, False], [False, False, True, True]]
