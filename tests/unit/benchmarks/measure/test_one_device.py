"""A host that is killed while a device measures: the next one takes the trial from there and repeats none."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from make import TESTS
from make.devices import COLD, HOT, write_rooted_python, write_sensors
from make.onnx_files import SAMPLES, save_product
from make.waiting import wait_until
from rankship_benchmarks.bundle.bundle import open_bundle

ROUNDS = 2
HOST = """
import pathlib, sys
from dataclasses import replace
sys.path.insert(0, sys.argv[3])
from make.artifacts import describe_file, sign
from make.builds import make_build
from make.devices import make_local
from rankship_benchmarks.measure import cases
from rankship_benchmarks.measure import one_device as measure
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.bundle.suite import Suite
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_pipeline.foundation.store import Store

folder, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
model = folder / "store/tiny.onnx"
build, proof = make_build(describe_file(model), recipe="tiny"), sign(model)
device = replace(make_local(folder / "work", "this-machine", folder / "python"), cool_below_mc=50_000)
suite = Suite(recipe="r", rounds=2, min_samples=20, min_duration_ms=1)
cases.find_inputs = lambda *_: [folder / "x.npy"]
if moment == "before forgetting":  # the trial is in the bundle, and still on the device
    measure.Session.forget = lambda *_: __import__("os").kill(__import__("os").getpid(), 9)
store, results, steps = Store(folder / "store"), folder / "results", Steps(quiet=True)
measure.measure_build(RunPlan(build, [proof], store, suite, results, ParityChoice()), device, steps)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sensors(tmp_path / "root", heat=HOT)
    write_rooted_python(tmp_path)
    save_product(tmp_path / "store/tiny.onnx")
    np.save(tmp_path / "x.npy", SAMPLES)
    return tmp_path


def start_host(folder: Path, moment: str = "") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", HOST, str(folder), moment, str(TESTS)], stdout=subprocess.DEVNULL)


def cool(folder: Path) -> None:
    write_sensors(folder / "root", heat=COLD)


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
    wait_until(lambda: bool(list(folder.glob("work/runs/*/events.jsonl"))))
    host.send_signal(signal.SIGKILL)
    host.wait()
    (run,) = (folder / "work/runs").iterdir()
    state = json.loads((run / "state.json").read_text())
    (note,) = (folder / "results").glob("*/.pending.json")
    begun = json.loads(note.read_text())["ticket"]
    assert begun["run"] == run.name
    if finished:
        cool(folder)
        wait_until(lambda: '"done"' in (run / "events.jsonl").read_text())
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
