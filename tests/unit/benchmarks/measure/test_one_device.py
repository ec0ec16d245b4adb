"""A host that is killed while a device measures: the next one takes the trial from there and repeats none."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rankship_benchmarks.bundle.bundle import open_bundle

ROUNDS = 2
HOST = """
import dataclasses, hashlib, pathlib, sys
from rankship_benchmarks.measure import one_device as measure
from rankship_benchmarks.bundle.suite import Suite
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.recipe.choices import ParityChoice
from rankship_pipeline.foundation.records import ArtifactKey, Artifact, Build, RankPlan, Verified
from rankship_pipeline.foundation.store import Store
from rankship_targets.devices.device import Device
from rankship_targets.session.manifest import sign_artifact

folder, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
model = folder / "store/tiny.onnx"
sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
key = ArtifactKey(variant="dense", format="onnx")
artifact = Artifact(key=key, file="tiny.onnx", size_bytes=model.stat().st_size, sha256=sha256,
    inputs=(), outputs=(), parameters=1, factored_layers=(), recipe_sha256="r", source_sha256={}, toolchain={})
plan = RankPlan(method="uniform", layers=(), fixed_parameters=1, total_parameters=1, unit="parameters",
    total_cost=1, budget_cost=1, predicted_error=0.0)
build = Build(recipe="tiny", recipe_sha256="r", artifacts=(artifact,), plan=plan, accuracies=(), alternatives=(),
    dense_parameters=1)
proof = Verified(artifact_sha256=sha256, key=key, runtime="onnxruntime", runtime_version="1",
    samples=1, max_relative_error=0.0, min_cosine=1.0, top1_agreement=1.0)
sign_artifact(model, proof, "r")
device = Device(name="this-machine", transport="local", python=str(folder / "python"), workdir=str(folder / "work"),
    cool_below_mc=50_000)
suite = Suite(recipe="r", rounds=2, min_samples=20, min_duration_ms=1)
measure.find_inputs = lambda *_: [folder / "x.npy"]
if moment == "before forgetting":  # the trial is in the bundle, and still on the device
    measure.Session.forget = lambda *_: __import__("os").kill(__import__("os").getpid(), 9)
store, results, steps = Store(folder / "store"), folder / "results", Steps(quiet=True)
measure.measure_build(build, [proof], store, device, suite, results, steps, limits=ParityChoice())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    heat = tmp_path / "root/sys/class/thermal/thermal_zone0/temp"
    heat.parent.mkdir(parents=True)
    heat.write_text("90000")
    (tmp_path / "python").write_text(f'#!/bin/sh\nRANKSHIP_AGENT_ROOT="{tmp_path}/root" exec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "store").mkdir()
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [0.5] * 12)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [weights],
    )
    made = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(made, tmp_path / "store/tiny.onnx")
    np.save(tmp_path / "x.npy", np.ones((1, 4), np.float32))
    return tmp_path


def start_host(folder: Path, moment: str = "") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", HOST, str(folder), moment], stdout=subprocess.DEVNULL)


def cool(folder: Path) -> None:
    (folder / "root/sys/class/thermal/thermal_zone0/temp").write_text("40000")


def await_true(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_whole(folder: Path) -> Path:
    assert start_host(folder).wait(timeout=120) == 0
    (bundle,) = (folder / "results").glob("[!.]*")
    read = open_bundle(bundle)
    assert read.finished
    assert [trial.round for trial in read.trials] == list(range(ROUNDS))
    assert sum(trial.retries for trial in read.trials) == 0
    assert not list((folder / "work/runs").iterdir())
    assert not (bundle / ".pending.json").exists()
    return bundle


@pytest.mark.parametrize("finished", [True, False])
def test_a_host_killed_while_the_device_measures_takes_the_trial_from_there(folder: Path, *, finished: bool) -> None:
    host = start_host(folder)
    await_true(lambda: bool(list(folder.glob("work/runs/*/events.jsonl"))))
    host.send_signal(signal.SIGKILL)
    host.wait()
    (run,) = (folder / "work/runs").iterdir()
    state = json.loads((run / "state.json").read_text())
    (note,) = (folder / "results").glob("*/.pending.json")
    begun = json.loads(note.read_text())["ticket"]
    assert begun["run"] == run.name
    if finished:
        cool(folder)
        await_true(lambda: '"done"' in (run / "events.jsonl").read_text())
        (samples,) = (line["ns"] for line in read_lines(run / "events.jsonl") if line["event"] == "samples")
        bundle = check_whole(folder)
        assert list(open_bundle(bundle).trials[0].samples_ns) == samples
    else:
        os.kill(state["pid"], 0)
        cool(folder)
        bundle = check_whole(folder)
    assert open_bundle(bundle).trials[0].started_utc == begun["started_utc"]


def test_a_host_killed_between_keeping_and_forgetting_repeats_nothing(folder: Path) -> None:
    cool(folder)
    assert start_host(folder, "before forgetting").wait(timeout=120) == -signal.SIGKILL
    (bundle,) = (folder / "results").glob("[!.]*")
    (kept,) = open_bundle(bundle).trials
    assert len(list((folder / "work/runs").iterdir())) == 1
    check_whole(folder)
    assert open_bundle(bundle).trials[0] == kept
