"""A whole session, on this machine and over a real SSH server: push, prove, measure, and every way out."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from make.artifacts import make_request, sign
from make.devices import make_local
from make.onnx_files import SAMPLES, WEIGHT, save_product
from rankship_pipeline.foundation.errors import (
    AuthError,
    BuildError,
    CommandFailed,
    ConnectionLost,
    Lacks,
    TargetBusy,
    TargetTimeout,
)
from rankship_pipeline.foundation.files import hash_file
from rankship_targets.client.agent_file import find_agent
from rankship_targets.client.connect import open_transport
from rankship_targets.devices.device import Device
from rankship_targets.enrol.doctor import examine
from rankship_targets.session.runner import DeviceRunner, HostRunner
from rankship_targets.session.session import open_session
from rankship_targets.transport import link
from rankship_targets.transport.lease import Owner, describe_owner
from rankship_targets.transport.protocol import Transport
from rankship_targets.trials.request import MeasureRequest
from rankship_targets.verbs.devices import doctor


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PAUSE_S", 0.0)
    monkeypatch.setattr(link, "PATIENCE_S", 0.5)


@pytest.fixture
def local(tmp_path: Path) -> Device:
    return make_local(tmp_path / "a device")


@pytest.fixture(params=["local", "ssh"])
def device(request: pytest.FixtureRequest, local: Device) -> Device:
    if request.param == "local":
        return local
    server: Device = request.getfixturevalue("ssh_server").device
    return replace(server, python=local.python, workdir=local.workdir)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_product(tmp_path / "tiny.onnx")


def ask(artifact: str, model: Path, *inputs: str, **changes: Any) -> MeasureRequest:  # noqa: ANN401
    sha256 = hash_file(model)
    return make_request(artifact, sha256, inputs, **{"round": 1, "min_samples": 30, "min_duration_ms": 5, **changes})


def test_a_sweep_times_several_artifacts_in_one_process_in_their_order(device: Device, model: Path) -> None:
    other = model.with_name("other.onnx")
    made = onnx.load(model)
    made.graph.name = "other"
    onnx.save(made, other)
    with open_session(device) as session:
        inputs = session.push_file(model.with_name("x.npy"))
        remotes = [session.push(path, sign(path)) for path in (model, other)]
        requests = [ask(remotes[0], model, inputs), ask(remotes[1], other, inputs)]
        trials = session.sweep([*requests, requests[0]])
        with pytest.raises(BuildError, match="not pushed as verified"):
            session.sweep([requests[0], ask("/elsewhere", model, inputs)])
        with pytest.raises(CommandFailed, match="files with the same number of samples"):
            session.sweep([ask(remotes[0], model)])
    shas = [hash_file(path) for path in (model, other, model)]
    assert [trial.artifact_sha256 for trial in trials] == shas
    assert all(len(trial.samples_ns) >= 30 and trial.warmup_ns and trial.load_ns > 0 for trial in trials)
    assert len({trial.started_utc for trial in trials}) == 1
    assert {trial.peak_rss_bytes for trial in trials} == {None}  # they share a process
    assert not list((Path(device.workdir) / "runs").iterdir())


def test_whole_session_gives_outputs_and_a_trial(device: Device, model: Path, tmp_path: Path) -> None:
    with open_session(device) as session:
        probe = session.probe()
        assert probe.runtimes["onnx"] is not None
        remote = session.push(model, sign(model))
        inputs = session.push_file(model.with_name("x.npy"))
        (output,), reading = session.infer("onnx", remote, [inputs], tmp_path)
        np.testing.assert_allclose(np.load(output), SAMPLES @ WEIGHT, rtol=1e-5)
        trial = session.measure(ask(remote, model, inputs))
    assert reading == trial.runtime
    assert reading.name == "onnxruntime"
    assert len(trial.samples_ns) >= 30
    assert trial.load_ns > 0
    assert trial.loop is not None
    assert trial.loop.length_ns >= sum(trial.samples_ns)
    assert trial.idle == ()
    assert trial.device == device.name
    assert trial.retries == 0
    assert trial.agent_sha256 == hashlib.sha256(find_agent().read_bytes()).hexdigest()
    assert trial.peak_rss_bytes is not None
    assert trial.runtime_rss_bytes is not None
    workdir = Path(device.workdir)
    assert sorted(path.name for path in workdir.iterdir()) == [
        *("agents", "artifacts", "files", "outputs", "run.lock", "runs")
    ]
    assert not list((workdir / "outputs").iterdir())
    assert not list((workdir / "runs").iterdir())
    assert (workdir / "artifacts" / trial.artifact_sha256 / "model.onnx").is_file()


def test_loading_alone_tells_time_and_memory(local: Device, model: Path) -> None:
    with open_session(local) as session:
        reading = session.load("onnx", session.push(model, sign(model)))
    assert reading.load_ns > 0
    assert reading.runtime.name == "onnxruntime"
    assert reading.runtime_rss_bytes is not None
    assert reading.loaded_rss_bytes is not None
    assert reading.loaded_rss_bytes >= reading.runtime_rss_bytes


def test_second_session_copies_nothing(device: Device, model: Path) -> None:
    def push() -> int:
        with open_session(device) as session:
            return Path(session.push(model, sign(model))).stat().st_mtime_ns

    assert push() == push()


def test_changed_file_is_never_pushed(local: Device, model: Path) -> None:
    verified = sign(model)
    model.write_bytes(model.read_bytes() + b"\0")
    with open_session(local) as session, pytest.raises(BuildError, match="nothing was pushed"):
        session.push(model, verified)
    assert not Path(local.workdir, "artifacts").exists()


def test_unverified_file_is_never_measured(local: Device, model: Path) -> None:
    with open_session(local) as session:
        remote = session.push_file(model)
        inputs = session.push_file(model.with_name("x.npy"))
        with pytest.raises(BuildError, match="not pushed as verified"):
            session.measure(ask(remote, model, inputs))
        verified = session.push(model, sign(model))
        with pytest.raises(BuildError, match="not pushed as verified"):
            session.measure(ask(verified, model, inputs, artifact_sha256="0" * 64))


def test_file_changed_on_the_device_is_not_measured(local: Device, model: Path) -> None:
    with open_session(local) as session:
        remote = session.push(model, sign(model))
        inputs = session.push_file(model.with_name("x.npy"))
        Path(remote).write_bytes(b"other")
        with pytest.raises(CommandFailed, match="has SHA-256"):
            session.measure(ask(remote, model, inputs))


def test_relative_workdir_starts_at_the_login_folder(
    local: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with open_session(replace(local, workdir="dev ice")) as session:
        assert session.push_file(find_agent()).startswith(str(tmp_path / "home/dev ice/files/"))


@pytest.mark.parametrize("python", ["no-such-python", "/dev/null"])
def test_missing_python_is_lacking(device: Device, python: str) -> None:
    with pytest.raises(Lacks, match="cannot start"), open_session(replace(device, python=python)):
        pass


def test_old_python_is_lacking(local: Device, tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho '[[3, 7], \"/tmp\", false]'\n")
    old.chmod(0o755)
    with pytest.raises(Lacks, match=r"Python 3\.7"), open_session(replace(local, python=str(old))):
        pass


# The lease


def test_device_in_use_is_busy_and_says_by_whom(device: Device) -> None:
    with open_session(device):
        with pytest.raises(TargetBusy, match=f"process {os.getpid()}") as caught, open_session(device):
            pass
        assert "lease" in caught.value.hint
    with open_session(device):
        pass


def test_lease_is_given_back_when_the_work_fails(device: Device) -> None:
    with pytest.raises(ZeroDivisionError), open_session(device):
        raise ZeroDivisionError
    assert not Path(device.workdir, "lease").exists()


def test_measuring_without_the_lease_is_refused(local: Device, model: Path) -> None:
    with open_session(local) as session:
        remote = session.push(model, sign(model))
        inputs = session.push_file(model.with_name("x.npy"))
        for note in Path(local.workdir, "lease").iterdir():
            note.unlink()
        leave_lease(local, replace(describe_owner(), host="elsewhere"))
        with pytest.raises(TargetBusy, match="elsewhere"):
            session.measure(ask(remote, model, inputs))
    assert Path(local.workdir, "lease").exists()


def leave_lease(device: Device, owner: Owner) -> None:
    Path(device.workdir, "lease").mkdir(parents=True, exist_ok=True)
    note = {name: getattr(owner, name) for name in ("token", "host", "namespace", "pid", "since_utc")}
    Path(device.workdir, "lease", f"{owner.token}.json").write_text(json.dumps(note))


# Transient errors


class Flaky:
    """Opens real transports whose named command breaks the connection a given number of times."""

    def __init__(self, command: str, *failures: Exception) -> None:
        self.command = command
        self.failures = list(failures)
        self.opened = 0

    def __call__(self, device: Device) -> Transport:
        self.opened += 1
        transport = open_transport(device)
        stream, run = transport.stream, transport.run

        def fail(argv: Sequence[str]) -> None:
            if self.failures and any(f'"{self.command}"' in word or word == self.command for word in argv):
                raise self.failures.pop(0)

        def flaky_stream(argv: Sequence[str], *, timeout_s: float) -> Iterator[str]:
            fail(argv)
            yield from stream(argv, timeout_s=timeout_s)

        def flaky_run(argv: Sequence[str], *, timeout_s: float) -> Any:  # noqa: ANN401
            fail(argv)
            return run(argv, timeout_s=timeout_s)

        transport.stream, transport.run = flaky_stream, flaky_run  # type: ignore[method-assign,assignment]
        return transport


def measure(device: Device, model: Path, connect: Callable[[Device], Transport]) -> int:
    with open_session(device, connect=connect) as session:
        inputs = session.push_file(model.with_name("x.npy"))
        return session.measure(ask(session.push(model, sign(model)), model, inputs)).retries


def test_broken_connections_are_tried_again_and_counted(device: Device, model: Path) -> None:
    flaky = Flaky("measure", ConnectionLost("gone"), ConnectionLost("gone again"))
    assert measure(device, model, flaky) == 2
    assert flaky.opened == 3


def test_retries_are_bounded(local: Device, model: Path) -> None:
    flaky = Flaky("measure", *[ConnectionLost(f"gone {time}") for time in range(5)])
    with pytest.raises(ConnectionLost, match="gone 2"):
        measure(local, model, flaky)
    assert not Path(local.workdir, "lease").exists()


def test_long_work_is_not_repeated_after_a_timeout(local: Device, model: Path) -> None:
    flaky = Flaky("fetch", TargetTimeout("slow"), TargetTimeout("slow again"))
    with pytest.raises(TargetTimeout, match=r"slow$"):
        measure(local, model, flaky)


def test_short_steps_are_repeated_after_a_timeout(local: Device, model: Path) -> None:
    flaky = Flaky("sha256sum", TargetTimeout("slow"))
    assert measure(local, model, flaky) == 0  # it was met before measuring
    assert flaky.opened == 2


def test_persistent_errors_are_not_tried_again(local: Device, model: Path) -> None:
    flaky = Flaky("measure", AuthError("no"))
    with pytest.raises(AuthError):
        measure(local, model, flaky)
    assert flaky.opened == 1


def test_device_that_dies_while_measuring_is_a_lost_connection(
    start_sshd: Callable[[], Any], local: Device, model: Path
) -> None:
    server = start_sshd()
    device = replace(server.device, python=local.python, workdir=local.workdir)
    with open_session(device) as session:
        inputs = session.push_file(model.with_name("x.npy"))
        remote = session.push(model, sign(model))
        server.stop()
        with pytest.raises(ConnectionLost):
            session.measure(ask(remote, model, inputs))


# Runners for the parity gate


def test_host_runner_computes_in_a_process_of_its_own(model: Path, tmp_path: Path) -> None:
    output = HostRunner().run("onnx", model, [model.with_name("x.npy")], tmp_path)
    assert output.runtime == "onnxruntime"
    np.testing.assert_allclose(np.load(output.outputs[0]), SAMPLES @ WEIGHT, rtol=1e-5)


def test_device_runner_computes_on_the_device(device: Device, model: Path, tmp_path: Path) -> None:
    with open_session(device) as session:
        output = DeviceRunner(session).run("onnx", model, [model.with_name("x.npy")], tmp_path)
    np.testing.assert_allclose(np.load(output.outputs[0]), SAMPLES @ WEIGHT, rtol=1e-5)


def test_broken_artifact_is_told_by_both_runners(local: Device, model: Path, tmp_path: Path) -> None:
    model.write_bytes(model.read_bytes()[:50])
    with pytest.raises(CommandFailed, match="tiny"):
        HostRunner().run("onnx", model, [model.with_name("x.npy")], tmp_path)
    with open_session(local) as session, pytest.raises(CommandFailed, match="here: "):
        DeviceRunner(session).run("onnx", model, [model.with_name("x.npy")], tmp_path)


# The doctor


def test_doctor_prints_every_check(local: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f'[lab]\ntransport = "local"\npython = "{local.python}"\nworkdir = "{local.workdir}"\n'
    (tmp_path / "devices.toml").write_text(text)
    assert doctor(["lab", "--inventory", str(tmp_path / "devices.toml")]) in {0, 4}
    printed = capsys.readouterr().out
    for name in ("reachable", "python", "onnx", "tflite", "executorch", "governor", "temperature", "load", "disk"):
        assert name in printed


@pytest.mark.parametrize(
    ("meter", "said"),
    [
        ('name = "replay"\nfile = "t.json"', "read after each trial"),
        ('name = "rapl"', "no powercap zone"),
        ('name = "hwmon"', "hwmon (measured): ina226@hwmon0:power1"),
        ('name = "hwmon"\nrails = ["gpu"]', "has no rail 'gpu'"),
    ],
)
def test_doctor_looks_at_the_meter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, meter: str, said: str
) -> None:
    sensor = tmp_path / "root/sys/class/hwmon/hwmon0"
    sensor.mkdir(parents=True)
    (sensor / "name").write_text("ina226\n")
    (sensor / "power1_input").write_text("3000000\n")
    monkeypatch.setenv("RANKSHIP_AGENT_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("COLUMNS", "200")
    inventory = tmp_path / "devices.toml"
    here = f'python = "{sys.executable}"\nworkdir = "{tmp_path / "work"}"\n'
    inventory.write_text(f'[board]\ntransport = "local"\n{here}[board.meter]\n{meter}\n')
    assert doctor(["board", "--inventory", str(inventory)]) in {0, 4}
    assert said in capsys.readouterr().out


def test_doctor_of_an_unreachable_device_fails_with_advice(
    local: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f'[lab]\ntransport = "local"\npython = "no-such-python"\nworkdir = "{local.workdir}"\n'
    (tmp_path / "devices.toml").write_text(text)
    assert doctor(["lab", "--inventory", str(tmp_path / "devices.toml")]) == 4
    assert "Lacks" in capsys.readouterr().out


def test_doctor_judges_what_the_probe_told(local: Device) -> None:
    with open_session(local) as session:
        probe = session.probe()
    bare = replace(probe, runtimes={"onnx": None}, numpy=None, psutil=None, free_bytes=1, swap_used_bytes=0)
    state = replace(probe.state, governor="ondemand", temperature_mc=81_000, load_1m_milli=9_000)
    verdicts = {check.name: check.verdict for check in examine(local, replace(bare, state=state, cpu_count=4))}
    assert {name for name, verdict in verdicts.items() if verdict == "fail"} == {
        *("onnx", "tflite", "executorch", "numpy", "temperature", "disk")
    }
    assert {name for name, verdict in verdicts.items() if verdict == "warn"} == {"governor", "load", "psutil"}
    still = replace(probe, swap_used_bytes=0, throttled=None)
    calm = replace(probe.state, governor="performance", temperature_mc=40_000, load_1m_milli=100, battery_percent=None)
    told = replace(still, state=calm, free_bytes=10**10, psutil="7")
    assert all(check.verdict == "ok" for check in examine(local, told) if check.name not in {"tflite", "executorch"})
    assert all(bool(check.advice) == (check.verdict != "ok") for check in examine(local, bare))
