"""The main job on a device reached over a real OpenSSH server on the loopback, from the inventory to the report."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from make.ssh_servers import SshServer
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.artifact_key import VARIANTS, ArtifactKey
from rankship_pipeline.foundation.formats import FORMATS
from rankship_targets.devices.device import Device


@pytest.fixture
def board(ssh_server: SshServer) -> Device:
    return ssh_server.device


@pytest.fixture(scope="module")
def suite(shared_recipe: Path, shared_store: Path) -> Path:
    assert main(["build", str(shared_recipe), "--store", str(shared_store)]) == 0
    path = shared_recipe.with_name("suite.toml")
    brief = "canary = false\nrounds = 2\nmin_samples = 20\nmin_duration_ms = 20\n"
    path.write_text(f'recipe = "{shared_recipe.name}"\n{brief}')
    return path


def _write_inventory(path: Path, device: Device, **changes: object) -> Path:
    changed = replace(device, **changes)  # type: ignore[arg-type]  # the test's own keywords
    keys = ("transport", "host", "user", "host_key", "key_file", "python", "workdir")
    lines = [f'{key} = "{getattr(changed, key)}"' for key in keys]
    path.write_text("\n".join([f"[{changed.name}]", *lines, f"port = {changed.port}", ""]))
    path.chmod(0o600)
    return path


def _bench(suite: Path, inventory: Path, name: str, store: Path, results: Path) -> int:
    flags = ["--on", name, "--inventory", str(inventory), "--store", str(store), "--results", str(results)]
    return main(["bench", str(suite), *flags])


@pytest.mark.slow
def test_all_formats_are_pushed_measured_and_reported(
    suite: Path, shared_store: Path, tmp_path: Path, board: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "on the board"
    inventory = _write_inventory(tmp_path / "devices.toml", board, python=sys.executable, workdir=str(workdir))
    assert _bench(suite, inventory, board.name, shared_store, tmp_path / "results") == 0, capsys.readouterr().err
    (folder,) = (tmp_path / "results").glob("[!.]*")
    bundle = open_bundle(folder)
    assert {(trial.round, trial.key) for trial in bundle.trials} == {
        (number, ArtifactKey(variant=variant, format=name))
        for number in range(2)
        for variant in VARIANTS
        for name in FORMATS
    }
    assert all(len(trial.samples_ns) >= 20 for trial in bundle.trials)
    proven = [proof.key for proof in bundle.header.verified_on_device]
    assert proven == [one.key for one in bundle.header.build.artifacts], "by the board's own runtimes"
    assert f"Parity on {board.name}, worst of 6 artifacts" in capsys.readouterr().out
    assert "too few rounds" in (folder / "report.html").read_text().lower()
    assert not list(workdir.rglob("*.part")), "nothing half-copied stays behind"
    assert not (workdir / "lease").exists()


def test_a_device_with_another_host_key_is_refused(
    suite: Path, shared_store: Path, tmp_path: Path, board: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGZha2VmYWtlZmFrZWZha2VmYWtlZmFrZWZha2VmYWtlZmFr"
    inventory = _write_inventory(tmp_path / "devices.toml", board, host_key=other)
    assert _bench(suite, inventory, board.name, shared_store, tmp_path / "results") == 4
    error = capsys.readouterr().err
    assert "HostKeyChanged" in error
    assert error.count("SHA256:") == 2


def test_a_device_without_the_runtimes_says_what_to_install(
    suite: Path, shared_store: Path, tmp_path: Path, board: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    python = bare / "python3"
    python.write_text('#!/bin/sh\nexec /usr/bin/env -u PYTHONPATH python3 -S "$@"\n')
    python.chmod(0o755)
    inventory = _write_inventory(
        tmp_path / "devices.toml", board, python=str(python), workdir=str(tmp_path / "workdir")
    )
    assert _bench(suite, inventory, board.name, shared_store, tmp_path / "results") == 4
    error = capsys.readouterr().err
    assert "has no runtime for onnx, tflite, executorch" in error
    assert all(f"pip install {name}" in error for name in ("onnxruntime", "ai-edge-litert", "executorch"))
    assert "✓ verify" not in error, "the device is asked before long work"
