"""The whole main job as a user starts it: in a process of its own, with its own store, cache and results."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_pipeline.foundation.store import MANIFEST, Store

pytestmark = pytest.mark.slow
ROUNDS, CASES = 6, 4  # what `run` measures by default; two formats, dense and compressed


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "rankship_pipeline.cli", *map(str, arguments)]


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "XDG_CONFIG_HOME": str(folder / "config")}


def _shrink(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + '\n[export]\nformats = ["onnx", "tflite"]\n')


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
    _shrink(recipe)
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


def test_verify_finds_a_file_changed_after_the_build_and_names_it(recipe: Path, tmp_path: Path) -> None:
    _shrink(recipe)
    store, environment = tmp_path / "store", _environment(tmp_path)
    built = subprocess.run(
        _command("build", recipe, "--store", store), env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    shown = subprocess.run(
        _command("show", recipe, "--store", store), env=environment, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "tiny" in shown.stdout
    victim = next(path for path in store.glob("artifact-*/model.tflite"))
    victim.write_bytes(victim.read_bytes()[:-100])
    checked = subprocess.run(
        _command("verify", recipe, "--store", store), env=environment, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 3
    assert "tflite (model.tflite) is not the file that was built" in checked.stderr
    ran = subprocess.run(_run_command(recipe, tmp_path), env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 3
    assert not list((tmp_path / "cache").rglob("artifacts/*")), "nothing unverified may be pushed"


def test_build_records_say_what_made_them(recipe: Path, tmp_path: Path) -> None:
    _shrink(recipe)
    done = subprocess.run(
        _command("build", recipe, "--store", tmp_path / "store"),
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("artifact-*/artifact.json")]
    assert len(records) == CASES
    for record in records:
        assert set(record["source_sha256"]) == {"a", "b"}
        assert record["toolchain"]["torch"].startswith("2.")
        (taken,) = record["inputs"]
        assert (taken["name"], taken["shape"], taken["dtype"]) == ("input.0", [1, 1, 8, 8], "float32")
        assert record["outputs"][0]["shape"] == [1, 3]
        assert bool(record["factored_layers"]) == (record["key"]["variant"] == "compressed")


def test_a_change_of_the_model_s_code_alone_is_built_anew(recipe: Path, tmp_path: Path) -> None:
    """Another operator without weights leaves every tensor as it was, and still makes another model."""
    _shrink(recipe)
    store, code = tmp_path / "store", recipe.with_name("model.py")
    texts = [code.read_text(), code.read_text().replace("nn.ReLU(), nn.Flatten()", "nn.Tanh(), nn.Flatten()")]
    counts = []
    for text in texts:
        code.write_text(text)
        done = subprocess.run(
            _command("build", recipe, "--store", store),
            env=_environment(tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        counts.append(sorted(b"Tanh" in path.read_bytes() for path in store.glob("artifact-*/model.onnx")))
    assert counts == [[False, False], [False, False, True, True]]
