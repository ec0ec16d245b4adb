"""The parity gate on the device: its own runtime is compared before anything is timed, once for each runtime."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from make.artifacts import describe_file
from make.builds import make_build
from make.devices import make_local, write_python
from make.onnx_files import SAMPLES, WEIGHT, make_products
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.judge.summary import summarise
from rankship_benchmarks.measure.device_gate import verify_on_device
from rankship_benchmarks.measure.one_device import measure_build
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.report.words import list_places, state_parity
from rankship_pipeline.export.parity import verify_artifact
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import ConnectionLost, ParityFailed
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.records import Build, RunOutput, TensorSpec, Verified
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.devices.device import Device, describe_this_machine
from rankship_targets.session.manifest import sign_artifact
from rankship_targets.session.runner import DeviceRunner, HostRunner
from rankship_targets.session.session import open_session

LIMITS = ParityChoice(samples=5)
SUITE = Suite(recipe="r", rounds=1, min_samples=3, min_duration_ms=1, max_warmup_ms=50)
STEPS = Steps(quiet=True)
# A device's onnxruntime of a release that computes something else: one output in a hundred is off.
WRONG_RUNTIME = """
import importlib, sys
sys.path.remove({folder!r}); del sys.modules["onnxruntime"]
real = importlib.import_module("onnxruntime")
class Wrong(real.InferenceSession):
    def io_binding(self):
        bound = super().io_binding()
        right = bound.copy_outputs_to_cpu
        bound.copy_outputs_to_cpu = lambda: [1.01 * output for output in right()]
        return bound
real.InferenceSession = Wrong
"""


@dataclass(frozen=True)
class Built:
    """A build of one artifact, with its host's proof."""

    build: Build
    proof: Verified
    store: Store
    device: Device

    def measure(self, results: Path, device: Device | None = None) -> Path:
        wanted = device or self.device
        plan = RunPlan(self.build, [self.proof], self.store, SUITE, results, LIMITS)
        return measure_build(plan, wanted, STEPS)  # as `bench` does


@pytest.fixture
def built(tmp_path: Path) -> Built:
    def make(folder: Path) -> None:
        onnx.save(make_products(WEIGHT), folder / "model.onnx")
        np.save(folder / "input.0.npy", SAMPLES)
        np.save(folder / "expected.0.npy", SAMPLES @ WEIGHT)

    store = Store(tmp_path / "store")
    entry = store.produce("artifact", {}, make)
    path = entry.folder / "model.onnx"
    artifact = describe_file(
        path,
        file=str(path.relative_to(store.root)),
        inputs=(TensorSpec(name="input.0", shape=(1, 4), dtype="float32"),),
        outputs=(TensorSpec(name="logits", shape=(1, 3), dtype="float32"),),
        parameters=12,
    )
    build = make_build(artifact, recipe="line", parameters=12)
    files = [entry.folder / name for name in ("input.0.npy", "expected.0.npy")]
    proof = verify_artifact(artifact, path, files[:1], files[1:], HostRunner(), LIMITS)
    sign_artifact(path, proof, "r")
    return Built(build, proof, store, make_local(tmp_path / "board", "board"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every artifact that is run on a device for its parity."""
    noted: list[str] = []
    run = DeviceRunner.run

    def note(
        self: DeviceRunner,
        format: Format,  # noqa: A002
        artifact: Path,
        inputs: Sequence[Path],
        into: Path,
        rows: int = 1,
        generation: Generation | None = None,
    ) -> RunOutput:
        noted.append(format)
        return run(self, format, artifact, inputs, into, rows, generation)

    monkeypatch.setattr(DeviceRunner, "run", note)
    return noted


def with_wrong_runtime(device: Device, folder: Path) -> Device:
    modules = folder / "modules"
    modules.mkdir()
    (modules / "onnxruntime.py").write_text(WRONG_RUNTIME.format(folder=str(modules)))
    return replace(device, python=str(write_python(folder, PYTHONPATH=modules)))


def test_the_devices_runtime_is_compared_once_and_its_proof_is_in_the_bundle(
    built: Built, runs: list[str], tmp_path: Path
) -> None:
    first = built.measure(tmp_path / "results")
    again = built.measure(tmp_path / "results")
    assert first != again
    assert runs == ["onnx"]
    header = open_bundle(again).header
    (proof,) = header.verified_on_device
    assert proof == open_bundle(first).header.verified_on_device[0]
    assert (proof.samples, proof.runtime) == (5, "onnxruntime")
    assert 0 <= proof.max_relative_error < 1e-5
    (result,) = summarise(open_bundle(again)).results
    assert result.device_parity == proof
    assert result.parity == built.proof
    assert [line.partition(",")[0] for line in state_parity(header)] == ["Parity on this host", "Parity on board"]


def test_a_device_that_computes_something_else_is_named_and_nothing_is_timed(
    built: Built, runs: list[str], tmp_path: Path
) -> None:
    wrong = with_wrong_runtime(built.device, tmp_path)
    built.measure(tmp_path / "results")
    with pytest.raises(ParityFailed, match=r"on board \(onnxruntime .*relative max error 1.00e-02") as caught:
        built.measure(tmp_path / "wrong", wrong)
    assert "nothing was timed" in caught.value.hint
    assert runs == ["onnx", "onnx"], "another interpreter needs a proof of its own"
    assert not (tmp_path / "wrong").exists()


def test_a_damaged_or_missing_proof_is_made_again(built: Built, runs: list[str], tmp_path: Path) -> None:
    built.measure(tmp_path / "results")
    (kept,) = Path(os.environ["XDG_STATE_HOME"]).glob("rankship/proofs/*.json")
    kept.write_text("{")
    built.measure(tmp_path / "results")
    assert len(runs) == 2
    kept.unlink()
    built.measure(tmp_path / "results")
    assert len(runs) == 3


def test_looser_or_tighter_limits_are_asked_anew(built: Built, runs: list[str]) -> None:
    path = built.store.root / built.build.artifacts[0].file
    with open_session(built.device) as session:
        pushed = {built.proof.artifact_sha256: session.push(path, built.proof)}
        for limits in (LIMITS, LIMITS, replace(LIMITS, max_relative_error=1e-3)):
            verify_on_device(built.build.files, built.store, session, pushed, limits, 1, STEPS)
    assert len(runs) == 2


def test_this_machine_needs_no_second_proof(built: Built, runs: list[str], tmp_path: Path) -> None:
    here = replace(describe_this_machine(), workdir=str(tmp_path / "here"))
    header = open_bundle(built.measure(tmp_path / "results", here)).header
    assert (runs, header.verified_on_device, list_places(header)) == ([], (), ["this host"])


def test_a_lost_connection_is_no_failed_parity(built: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lose(*_: object) -> RunOutput:
        raise ConnectionLost("the cable is out")

    monkeypatch.setattr(DeviceRunner, "run", lose)
    with pytest.raises(ConnectionLost):
        built.measure(tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_bundle_from_before_is_read_and_says_that_the_device_was_not_compared(built: Built, tmp_path: Path) -> None:
    header = open_bundle(built.measure(tmp_path / "results")).header
    text = encode(replace(header, verified_on_device=())).replace(',"verified_on_device":[]', "")
    old = decode(type(header), text, where="an old bundle")
    assert old.verified_on_device == ()
    assert list(state_parity(old))[1] == "Parity on board: not proven."
