"""A measurement whose host, cable, agent or device fails in the middle: found again, or begun anew at most once."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from rankship_pipeline.foundation.errors import (
    AgentDied,
    CommandFailed,
    ConnectionLost,
    Rebooted,
    TargetBusy,
    TargetTimeout,
)
from rankship_pipeline.foundation.records import ArtifactKey, Verified
from rankship_targets.client.detached import Ticket, make_ticket
from rankship_targets.devices.device import Device
from rankship_targets.session import session
from rankship_targets.session.manifest import sign_artifact
from rankship_targets.session.session import open_session
from rankship_targets.transport import link
from rankship_targets.trials.request import MeasureRequest
from rankship_targets.trials.trial import Trial

HOT, COLD = "90000", "40000"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PAUSE_S", 0.0)
    monkeypatch.setattr(link, "PATIENCE_S", 20.0)


class Board:
    """A device that is too warm to measure until `cool` is called, reached as its inventory entry says."""

    def __init__(self, folder: Path, device: Device) -> None:
        root = folder / "root"
        self.heat = root / "sys/class/thermal/thermal_zone0/temp"
        self.boot = root / "proc/sys/kernel/random/boot_id"
        self.governor = root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
        for path, text in ((self.heat, HOT), (self.boot, "first"), (self.governor, "ondemand")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nRANKSHIP_AGENT_ROOT="{root}" exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.workdir = folder / "work"
        self.device = replace(device, python=str(python), workdir=str(self.workdir), cool_below_mc=50_000)
        self.model = folder / "tiny.onnx"
        weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [0.5] * 12)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "tiny",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
            [weights],
        )
        onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), self.model)
        np.save(folder / "x.npy", np.ones((1, 4), np.float32))

    def cool(self) -> None:
        self.heat.write_text(COLD)

    def measure(self, tell: Callable[[str], None], ticket: Ticket | None = None, **changes: Any) -> Trial:  # noqa: ANN401
        sha256 = hashlib.sha256(self.model.read_bytes()).hexdigest()
        verified = Verified(
            artifact_sha256=sha256,
            key=ArtifactKey(variant="dense", format="onnx"),
            runtime="onnxruntime",
            runtime_version="1",
            samples=1,
            max_relative_error=0.0,
            min_cosine=1.0,
            top1_agreement=1.0,
        )
        sign_artifact(self.model, verified, "0" * 64)
        with open_session(self.device, on_news=tell) as held:
            request = MeasureRequest(
                round=0,
                key=ArtifactKey(variant="dense", format="onnx"),
                artifact=held.push(self.model, verified),
                artifact_sha256=sha256,
                inputs=(held.push_file(self.model.with_name("x.npy")),),
                threads=1,
                min_samples=20,
                min_duration_ms=1,
                max_warmup_ms=2000,
            )
            return held.measure(replace(request, **changes), ticket)

    def folders(self) -> list[Path]:
        return list((self.workdir / "runs").iterdir())

    def state(self) -> dict[str, Any]:
        (folder,) = self.folders()
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        return state

    def kill(self) -> None:
        os.kill(self.state()["pid"], signal.SIGKILL)

    def events(self, name: str) -> int:
        (folder,) = self.folders()
        lines = (folder / "events.jsonl").read_text().splitlines()
        return sum(json.loads(line)["event"] == name for line in lines)


def lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def await_true(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path, Device(name="here", transport="local"))
    yield board
    if (board.workdir / "runs").exists():
        for folder in board.folders():
            with suppress(OSError, ProcessLookupError):
                os.killpg(json.loads((folder / "state.json").read_text())["pid"], signal.SIGKILL)


class Events:
    """Does one thing after the other, each time the device says that it is too warm; other news is of its absence."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self.actions = list(actions)

    def __call__(self, text: str) -> None:
        if "90.0 °C" not in text:
            assert "cannot be reached" in text
        elif self.actions:
            self.actions.pop(0)()


def test_a_device_that_is_too_warm_is_waited_for(board: Board) -> None:
    trial = board.measure(Events(board.cool))
    assert trial.conditions.unmet == ()
    assert trial.before.temperature_mc == 40_000
    assert trial.retries == 0
    assert not board.folders()


def test_a_device_that_stays_too_warm_is_measured_and_the_trial_says_so(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LONGEST_COOLING_S", 0.1)
    trial = board.measure(Events())
    assert trial.conditions.unmet == ("below 50000 m°C: still 90000 m°C after 0.1 s",)
    assert trial.conditions.cooling_ms >= 100


def test_a_run_finishes_while_the_server_is_gone_and_is_found_again(
    tmp_path: Path, start_sshd: Callable[[], Any], board: Board
) -> None:
    server = start_sshd()
    (tmp_path / "far").mkdir()
    board = Board(tmp_path / "far", server.device)
    restarted: list[subprocess.Popen[bytes]] = []

    def pull_the_cable() -> None:
        server.stop()
        worker = board.state()["pid"]
        assert lives(worker)
        board.cool()
        await_true(lambda: not lives(worker))
        assert board.events("done") == 1
        restarted.append(subprocess.Popen(server.process.args, stdin=-3, stdout=-3, stderr=-3))

    try:
        ticket = make_ticket()
        trial = board.measure(Events(pull_the_cable), ticket)
        assert trial.retries >= 1
        assert len(trial.samples_ns) >= 20
        assert trial.started_utc == ticket.started_utc
        assert board.events("settled") == 1
    finally:
        for process in restarted:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait()
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def test_a_device_that_stays_away_is_a_lost_connection_within_the_patience(
    tmp_path: Path, start_sshd: Callable[[], Any], board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PATIENCE_S", 0.5)
    server = start_sshd()
    (tmp_path / "far").mkdir()
    board = Board(tmp_path / "far", server.device)
    with pytest.raises(ConnectionLost):
        board.measure(Events(server.stop), make_ticket())
    assert lives(board.state()["pid"])
    board.kill()


def test_a_killed_run_is_begun_anew_once(board: Board) -> None:
    trial = board.measure(Events(board.kill, board.cool))
    assert trial.retries == 1
    assert not board.folders()


def test_a_run_that_is_killed_again_has_died_and_leaves_nothing(board: Board) -> None:
    events = Events(board.kill, board.kill, board.kill)
    with pytest.raises(AgentDied):
        board.measure(events, make_ticket())
    assert len(events.actions) == 1
    assert not board.folders()


def test_a_restarted_device_gets_the_run_anew_once(board: Board) -> None:
    def reboot(name: str) -> None:
        board.kill()
        board.boot.write_text(name)

    trial = board.measure(Events(lambda: reboot("second"), board.cool))
    assert trial.retries == 1
    assert (trial.before.boot_id, trial.after.boot_id) == ("second", "second")
    board.heat.write_text(HOT)
    with pytest.raises(Rebooted):
        board.measure(Events(lambda: reboot("third"), lambda: reboot("fourth")))


def test_a_killed_follower_is_replaced_and_the_run_goes_on(board: Board) -> None:
    def kill_follower() -> None:
        commands = {child.pid: child.cmdline() for child in psutil.Process().children()}
        (follower,) = [pid for pid, command in commands.items() if '"fetch"' in command[-1]]
        os.kill(follower, signal.SIGKILL)
        born.append(board.state()["born"])
        board.cool()

    born: list[str] = []
    ticket = make_ticket()
    trial = board.measure(Events(kill_follower), ticket)
    assert trial.retries == 1
    assert board.state()["born"] == born[0]


def test_a_run_that_takes_too_long_is_ended_on_the_device(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LONGEST_COOLING_S", 0.0)
    board.cool()
    with pytest.raises(TargetTimeout):
        board.measure(Events(), make_ticket(), min_duration_ms=600_000, timeout_s=4.0)
    assert not board.folders()
    with (board.workdir / "run.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever measured holds it no more


def test_two_runs_at_once_are_refused_even_without_the_lease(board: Board) -> None:
    def measure_too() -> None:
        for note in (board.workdir / "lease").iterdir():
            note.unlink()
        (board.workdir / "lease").rmdir()
        with pytest.raises(TargetBusy, match="is going on"):
            board.measure(Events(), make_ticket())
        board.cool()

    assert len(board.measure(Events(measure_too)).samples_ns) >= 20


def test_what_fails_is_forgotten_at_once(board: Board) -> None:
    board.cool()
    board.model.write_bytes(board.model.read_bytes()[:50])
    with pytest.raises(CommandFailed, match="model"):
        board.measure(Events(), make_ticket())
    assert not board.folders()


# What a session sets


def test_the_governor_is_set_while_measuring_and_restored(board: Board) -> None:
    board.device = replace(board.device, governor="performance", cool_below_mc=None)
    trial = board.measure(Events())
    assert (trial.before.governor, trial.after.governor) == ("performance", "performance")
    assert trial.conditions.unmet == ()
    assert board.governor.read_text() == "ondemand"
    assert not (board.workdir / "governor.json").exists()


def test_the_governor_is_restored_when_measuring_fails(board: Board) -> None:
    board.device = replace(board.device, governor="performance")

    def fail() -> None:
        assert board.governor.read_text() == "performance"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        board.measure(Events(fail))
    assert board.governor.read_text() == "ondemand"
    assert not board.folders()


def test_a_governor_that_cannot_be_set_is_told(board: Board) -> None:
    board.governor.unlink()
    board.governor.mkdir()
    board.device = replace(board.device, governor="performance", cool_below_mc=None)
    assert board.measure(Events()).conditions.unmet == ("governor performance: Is a directory",)
    assert not (board.workdir / "governor.json").exists()


DYING_HOST = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import test_detached as tests
from dataclasses import replace
board = tests.Board(pathlib.Path(sys.argv[2]), tests.Device(name="here", transport="local"))
board.device = replace(board.device, governor="performance")
board.measure(lambda _: os.kill(os.getpid(), signal.SIGKILL), tests.make_ticket())
"""


@pytest.mark.parametrize("governor", [None, "powersave"])
def test_what_a_dead_host_set_is_restored_by_the_next_session(tmp_path: Path, governor: str | None) -> None:
    folder = tmp_path / "far"
    folder.mkdir()
    host = subprocess.run(
        [sys.executable, "-c", DYING_HOST, str(Path(__file__).parent), str(folder)], check=False, timeout=120
    )
    assert host.returncode == -signal.SIGKILL
    place = folder / "root/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    assert place.read_text() == "performance"
    device = Device(
        name="here", transport="local", python=str(folder / "python"), workdir=str(folder / "work"), governor=governor
    )
    with open_session(device):
        pass
    assert place.read_text() == "ondemand"
    (left,) = (folder / "work/runs").iterdir()
    os.killpg(json.loads((left / "state.json").read_text())["pid"], signal.SIGKILL)


def test_cores_are_kept_to_and_absent_ones_are_told(board: Board) -> None:
    board.cool()
    mine = min(os.sched_getaffinity(0))
    board.device = replace(board.device, cpus=(mine, 1000))
    trial = board.measure(Events())
    assert trial.conditions.cpus == (mine,)
    assert trial.conditions.unmet == (f"cores {mine}, 1000: the device does not have 1000",)
    board.device = replace(board.device, cpus=(1000,))
    (unmet,) = board.measure(Events()).conditions.unmet
    assert unmet.startswith("cores 1000: ")
