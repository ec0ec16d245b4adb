"""A measurement whose host, cable, agent or device fails in the middle: found again, or begun anew at most once."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from make import TESTS
from make.boards import WarmBoard
from make.devices import HOT
from make.waiting import is_alive, wait_until
from rankship_pipeline.foundation.errors import (
    AgentDied,
    CommandFailed,
    ConnectionLost,
    Rebooted,
    TargetBusy,
    TargetTimeout,
)
from rankship_targets.client.detached import make_ticket
from rankship_targets.devices.device import Device
from rankship_targets.session import session
from rankship_targets.session.session import open_session
from rankship_targets.transport import link


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PAUSE_S", 0.0)
    monkeypatch.setattr(link, "PATIENCE_S", 20.0)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[WarmBoard]:
    board = WarmBoard(tmp_path, Device(name="here", transport="local"))
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


def test_a_device_that_is_too_warm_is_waited_for(board: WarmBoard) -> None:
    trial = board.measure(Events(board.cool))
    assert trial.conditions.unmet == ()
    assert trial.before.temperature_mc == 40_000
    assert trial.retries == 0
    assert not board.folders()


def test_a_device_that_stays_too_warm_is_measured_and_the_trial_says_so(
    board: WarmBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LONGEST_COOLING_S", 0.1)
    trial = board.measure(Events())
    assert trial.conditions.unmet == ("below 50000 m°C: still 90000 m°C after 0.1 s",)
    assert trial.conditions.cooling_ms >= 100


def test_a_run_finishes_while_the_server_is_gone_and_is_found_again(
    tmp_path: Path, start_sshd: Callable[[], Any], board: WarmBoard
) -> None:
    server = start_sshd()
    (tmp_path / "far").mkdir()
    board = WarmBoard(tmp_path / "far", server.device)
    restarted: list[subprocess.Popen[bytes]] = []

    def pull_the_cable() -> None:
        server.stop()
        worker = board.state()["pid"]
        assert is_alive(worker)
        board.cool()
        wait_until(lambda: not is_alive(worker))
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
    tmp_path: Path, start_sshd: Callable[[], Any], board: WarmBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PATIENCE_S", 0.5)
    server = start_sshd()
    (tmp_path / "far").mkdir()
    board = WarmBoard(tmp_path / "far", server.device)
    with pytest.raises(ConnectionLost):
        board.measure(Events(server.stop), make_ticket())
    assert is_alive(board.state()["pid"])
    board.kill()


def test_a_killed_run_is_begun_anew_once(board: WarmBoard) -> None:
    trial = board.measure(Events(board.kill, board.cool))
    assert trial.retries == 1
    assert not board.folders()


def test_a_run_that_is_killed_again_has_died_and_leaves_nothing(board: WarmBoard) -> None:
    events = Events(board.kill, board.kill, board.kill)
    with pytest.raises(AgentDied):
        board.measure(events, make_ticket())
    assert len(events.actions) == 1
    assert not board.folders()


def test_a_restarted_device_gets_the_run_anew_once(board: WarmBoard) -> None:
    def reboot(name: str) -> None:
        board.kill()
        board.boot.write_text(name)

    trial = board.measure(Events(lambda: reboot("second"), board.cool))
    assert trial.retries == 1
    assert (trial.before.boot_id, trial.after.boot_id) == ("second", "second")
    board.heat.write_text(HOT)
    with pytest.raises(Rebooted):
        board.measure(Events(lambda: reboot("third"), lambda: reboot("fourth")))


def test_a_killed_follower_is_replaced_and_the_run_goes_on(board: WarmBoard) -> None:
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


def test_a_run_that_takes_too_long_is_ended_on_the_device(board: WarmBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LONGEST_COOLING_S", 0.0)
    board.cool()
    with pytest.raises(TargetTimeout):
        board.measure(Events(), make_ticket(), min_duration_ms=600_000, timeout_s=4.0)
    assert not board.folders()
    with (board.workdir / "run.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever measured holds it no more


def test_two_runs_at_once_are_refused_even_without_the_lease(board: WarmBoard) -> None:
    def measure_too() -> None:
        for note in (board.workdir / "lease").iterdir():
            note.unlink()
        (board.workdir / "lease").rmdir()
        with pytest.raises(TargetBusy, match="is going on"):
            board.measure(Events(), make_ticket())
        board.cool()

    assert len(board.measure(Events(measure_too)).samples_ns) >= 20


def test_what_fails_is_forgotten_at_once(board: WarmBoard) -> None:
    board.cool()
    board.model.write_bytes(board.model.read_bytes()[:50])
    with pytest.raises(CommandFailed, match="model"):
        board.measure(Events(), make_ticket())
    assert not board.folders()


# What a session sets


def test_the_governor_is_set_while_measuring_and_restored(board: WarmBoard) -> None:
    board.device = replace(board.device, governor="performance", cool_below_mc=None)
    trial = board.measure(Events())
    assert (trial.before.governor, trial.after.governor) == ("performance", "performance")
    assert trial.conditions.unmet == ()
    assert board.governor.read_text() == "ondemand"
    assert not (board.workdir / "governor.json").exists()


def test_the_governor_is_restored_when_measuring_fails(board: WarmBoard) -> None:
    board.device = replace(board.device, governor="performance")

    def fail() -> None:
        assert board.governor.read_text() == "performance"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        board.measure(Events(fail))
    assert board.governor.read_text() == "ondemand"
    assert not board.folders()


def test_a_governor_that_cannot_be_set_is_told(board: WarmBoard) -> None:
    board.governor.unlink()
    board.governor.mkdir()
    board.device = replace(board.device, governor="performance", cool_below_mc=None)
    assert board.measure(Events()).conditions.unmet == ("governor performance: Is a directory",)
    assert not (board.workdir / "governor.json").exists()


DYING_HOST = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from make.boards import WarmBoard
from rankship_targets.client.detached import make_ticket
from rankship_targets.devices.device import Device
board = WarmBoard(pathlib.Path(sys.argv[2]), Device(name="here", transport="local"))
board.device = replace(board.device, governor="performance")
board.measure(lambda _: os.kill(os.getpid(), signal.SIGKILL), make_ticket())
"""


@pytest.mark.parametrize("governor", [None, "powersave"])
def test_what_a_dead_host_set_is_restored_by_the_next_session(tmp_path: Path, governor: str | None) -> None:
    folder = tmp_path / "far"
    folder.mkdir()
    host = subprocess.run([sys.executable, "-c", DYING_HOST, str(TESTS), str(folder)], check=False, timeout=120)
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


def test_cores_are_kept_to_and_absent_ones_are_told(board: WarmBoard) -> None:
    board.cool()
    mine = min(os.sched_getaffinity(0))
    board.device = replace(board.device, cpus=(mine, 1000))
    trial = board.measure(Events())
    assert trial.conditions.cpus == (mine,)
    assert trial.conditions.unmet == (f"cores {mine}, 1000: the device does not have 1000",)
    board.device = replace(board.device, cpus=(1000,))
    (unmet,) = board.measure(Events()).conditions.unmet
    assert unmet.startswith("cores 1000: ")
