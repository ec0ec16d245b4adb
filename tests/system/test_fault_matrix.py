"""Every fault of a board × {probe, push, measure, fetch}, injected for real into a board with namespaces of its own.

The board is a real OpenSSH server, or the stand-in for a phone's daemon behind a real adb, with a network, processes
and mounts of its own: packets are swallowed by nftables, connections reset by the kernel, processes stopped and killed,
its disk filled and turned read-only, all of it killed at once as by a power cut. Each cell names the error or the
recovery. Afterwards nothing is half-written there or here, no lease is left, and the next try works and sends nothing
again that is whole.

RANKSHIP_FAULT_FIGURES=FILE adds a line for each cell, with the seconds it took; RANKSHIP_FAULT_LIMITS=true keeps the
limits that users have (the tests otherwise shorten the waits, not what is waited for).
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from make.devices import COLD
from make.fault_steps import ARTIFACT_BYTES, Step, left_by_steps, list_halves
from make.faults import ADB_FAULTS, FAULTS, HUNG_S, TRUE_LIMITS, recover_speed, throttle
from make.networked_boards import NetworkedBoard
from rankship_benchmarks.judge.validity import judge_trial, refuse_trials
from rankship_pipeline.foundation.errors import (
    AgentDied,
    AuthError,
    ConnectionLost,
    HostKeyChanged,
    Lacks,
    NoSpace,
    ReadOnly,
    TargetError,
    TargetTimeout,
    Throttled,
    Unauthorised,
    Unreachable,
)
from rankship_targets.client import calls as client
from rankship_targets.client import detached
from rankship_targets.session import session
from rankship_targets.session.manifest import SUFFIX as MANIFEST_SUFFIX
from rankship_targets.session.session import open_session
from rankship_targets.transport import lease, link, receiving
from rankship_targets.transport import protocol as transport
from rankship_targets.transport.adb import command as adb_command
from rankship_targets.transport.adb import connection as adb
from rankship_targets.transport.adb import state as adb_state
from rankship_targets.transport.adb.connection import AdbTransport
from rankship_targets.transport.protocol import Completed, Transport
from rankship_targets.transport.ssh import connection as ssh
from rankship_targets.transport.ssh import route as ssh_route
from rankship_targets.transport.ssh.connection import SshTransport

PROGRAMS = {"ip": "iproute2", "nft": "nftables", "nsenter": "util-linux", "/usr/sbin/sshd": "openssh-server"}
pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="a board with a network of its own is made by root"),
    *(
        pytest.mark.skipif(not shutil.which(name), reason=f"no {name}: apt-get install {package}")
        for name, package in PROGRAMS.items()
    ),
]
RECOVERS = None
ADB_CELLS: dict[tuple[str, str], type[TargetError] | None] = {
    ("unauthorised", "probe"): Unauthorised,
    ("unauthorised", "push"): Unauthorised,
    ("unauthorised", "measure"): Unauthorised,
    ("unauthorised", "fetch"): Unauthorised,
    ("gone", "probe"): ConnectionLost,
    ("gone", "push"): ConnectionLost,
    ("gone", "measure"): ConnectionLost,
    ("gone", "fetch"): ConnectionLost,
    ("cable out for 3 s", "probe"): RECOVERS,
    ("cable out for 3 s", "push"): RECOVERS,
    ("cable out for 3 s", "measure"): RECOVERS,
    ("cable out for 3 s", "fetch"): RECOVERS,
    ("frozen adbd", "probe"): ConnectionLost,
    ("frozen adbd", "push"): ConnectionLost,
    ("frozen adbd", "measure"): ConnectionLost,
    ("frozen adbd", "fetch"): ConnectionLost,
    ("no space", "probe"): NoSpace,
    ("no space", "push"): NoSpace,
    ("no space", "measure"): NoSpace,
    ("no space", "fetch"): RECOVERS,
    ("read-only", "probe"): ReadOnly,
    ("read-only", "push"): ReadOnly,
    ("read-only", "measure"): ReadOnly,
    ("read-only", "fetch"): ReadOnly,
    ("agent killed", "push"): RECOVERS,
    ("agent killed", "measure"): RECOVERS,
    ("rebooted", "probe"): RECOVERS,
    ("rebooted", "push"): RECOVERS,
    ("rebooted", "measure"): RECOVERS,
    ("rebooted", "fetch"): RECOVERS,
}
CELLS: dict[tuple[str, str], type[TargetError] | None] = {
    ("login refused", "probe"): AuthError,
    ("login refused", "push"): AuthError,
    ("login refused", "measure"): AuthError,
    ("login refused", "fetch"): AuthError,
    ("host key changed", "probe"): HostKeyChanged,
    ("host key changed", "push"): HostKeyChanged,
    ("host key changed", "measure"): HostKeyChanged,
    ("host key changed", "fetch"): HostKeyChanged,
    ("unreachable", "probe"): Unreachable,
    ("unreachable", "push"): Unreachable,
    ("unreachable", "measure"): Unreachable,
    ("unreachable", "fetch"): Unreachable,
    ("hung: packets swallowed", "probe"): Unreachable,
    ("hung: packets swallowed", "push"): Unreachable,
    ("hung: packets swallowed", "measure"): Unreachable,
    ("hung: packets swallowed", "fetch"): Unreachable,
    ("hung: processes stopped", "probe"): Unreachable,
    ("hung: processes stopped", "push"): Unreachable,
    ("hung: processes stopped", "measure"): Unreachable,
    ("hung: processes stopped", "fetch"): TargetTimeout,
    ("reset", "probe"): RECOVERS,
    ("reset", "push"): RECOVERS,
    ("reset", "measure"): RECOVERS,
    ("reset", "fetch"): RECOVERS,
    ("no space", "probe"): NoSpace,
    ("no space", "push"): NoSpace,
    ("no space", "measure"): NoSpace,
    ("no space", "fetch"): RECOVERS,
    ("read-only", "probe"): ReadOnly,
    ("read-only", "push"): ReadOnly,
    ("read-only", "measure"): ReadOnly,
    ("read-only", "fetch"): ReadOnly,
    ("agent killed", "push"): RECOVERS,
    ("agent killed", "measure"): RECOVERS,
    ("agent killed", "fetch"): RECOVERS,
    ("agent killed at its start", "probe"): RECOVERS,
    ("agent killed at its start", "fetch"): AgentDied,
    ("rebooted", "probe"): RECOVERS,
    ("rebooted", "push"): RECOVERS,
    ("rebooted", "measure"): RECOVERS,
    ("rebooted", "fetch"): RECOVERS,
    ("missing runtime", "probe"): RECOVERS,
    ("missing runtime", "push"): RECOVERS,
    ("missing runtime", "measure"): Lacks,
    ("missing runtime", "fetch"): Lacks,
    ("wrong ABI", "probe"): RECOVERS,
    ("wrong ABI", "push"): RECOVERS,
    ("wrong ABI", "measure"): Lacks,
    ("wrong ABI", "fetch"): Lacks,
}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkedBoard]:
    made = NetworkedBoard(tmp_path_factory.mktemp("board"))
    with open_session(made.device):  # the agent is there from now on
        pass
    yield made
    made.stop()


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkedBoard]:
    if not shutil.which("adb"):
        pytest.skip("no adb here: apt-get install adb")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("phone")
        patch.setattr(adb_command, "HOME", str(folder / "work"))
        made = NetworkedBoard(folder, "adb")
        with open_session(made.device):
            pass
        yield made
        made.stop()


@pytest.fixture(autouse=True)
def _limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shorten every wait, unless the figures of the true ones are wanted; end what hangs past all of them."""
    if not TRUE_LIMITS:
        for room in (adb, client, detached, lease, receiving, session, ssh, transport):
            if hasattr(room, "STEP_TIMEOUT_S"):
                monkeypatch.setattr(room, "STEP_TIMEOUT_S", 8.0)
        for function in (transport.run_checked, transport.hash_remote, transport.hash_many):
            assert function.__kwdefaults__
            monkeypatch.setitem(function.__kwdefaults__, "timeout_s", 8.0)
        monkeypatch.setattr(adb_command, "QUIET_S", 4.0)
        monkeypatch.setattr(adb_command, "ANSWER_S", 4.0)
        monkeypatch.setattr(adb_state, "ANSWER_S", 3.0)
        monkeypatch.setattr(ssh, "CONNECT_TIMEOUT_S", 4.0)
        monkeypatch.setattr(ssh, "KEEPALIVE_S", 1)
        monkeypatch.setattr(ssh_route, "SILENCE_LIMIT_MS", 3000)
        # The phone's daemon takes a while to start, and some of its faults come while nobody waits for that.
        monkeypatch.setattr(link, "PATIENCE_S", 20.0 if "phone" in request.fixturenames else 4.0)

    def give_up(*_: object) -> None:
        pytest.fail(f"it hung for {HUNG_S:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(round(HUNG_S))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@dataclass
class Sent:
    """What was copied to the board: each file's name and the place in it from which on it was sent."""

    offsets: dict[str, list[int]] = field(default_factory=dict)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    spied = Sent()

    def spy(feed: Callable[..., Completed]) -> Callable[..., Completed]:
        def note(self: Transport, argv: Any, local: Path, *, offset: int = 0, **rest: Any) -> Completed:  # noqa: ANN401
            spied.offsets.setdefault(local.name, []).append(offset)
            return feed(self, argv, local, offset=offset, **rest)

        return note

    for kind in (SshTransport, AdbTransport):
        monkeypatch.setattr(kind, "feed", spy(kind.feed))
    return spied


def name_cell(word: object) -> str:
    """Name a cell's part in the test's name."""
    return str(word).replace(" ", "-")


@pytest.mark.parametrize(("fault", "name"), CELLS, ids=name_cell)
def test_a_fault_ends_in_its_error_or_is_got_over(
    board: NetworkedBoard, sent: Sent, tmp_path: Path, fault: str, name: str
) -> None:
    try_cell(board, sent, tmp_path, fault, name)


@pytest.mark.phone_faults
@pytest.mark.parametrize(("fault", "name"), ADB_CELLS, ids=name_cell)
def test_a_phones_fault_ends_in_its_error_or_is_got_over(
    phone: NetworkedBoard, sent: Sent, tmp_path: Path, fault: str, name: str
) -> None:
    try_cell(phone, sent, tmp_path, fault, name)


def try_cell(board: NetworkedBoard, sent: Sent, tmp_path: Path, fault: str, name: str) -> None:
    """Strike in mid-step, and see what is said, what is left, and what the next try does."""
    cells, faults = (CELLS, FAULTS) if board.way == "ssh" else (ADB_CELLS, ADB_FAULTS)
    expected, what = cells[fault, name], faults[fault]
    struck_s: list[float] = []

    def strike() -> None:
        struck_s.append(time.monotonic())
        what.come(board)

    step = Step(name, tmp_path, board, strike, before=what.before or name == "probe")
    step.kind = what.kind
    if name == "probe" and what.first:
        step.strike()
    failure: TargetError | None = None
    retries = 0
    try:
        with open_session(board.device, on_news=step.hear) as held:
            step.prepare(held)
            sent.offsets.clear()
            step.act(held)
            retries = held._link.retries
            ended_s = time.monotonic()
    except TargetError as raised:
        failure, ended_s = raised, time.monotonic()
    assert struck_s, "the fault never came"
    what.go(board)
    board.heat.write_text(COLD)
    note_figures(board.way, fault, name, failure, ended_s - struck_s[0], retries)
    assert is_as_expected(board, failure, expected), repr(failure)
    if failure is not None:
        assert str(failure)
        assert failure.hint
        assert list(step.into.iterdir()) == [], "nothing half-written stays here"
    assert list_halves(board, step) == []
    parts = list(board.work.rglob("*.part"))
    if not what.cuts:
        assert parts == []
    resumed_from = [part.stat().st_size for part in parts]

    sent.offsets.clear()
    step.calm()
    with open_session(board.device) as held:
        step.prepare(held)
        step.act(held)
        held.forget(step.ticket)
    assert left_by_steps(board) == []
    again = dict(sent.offsets)
    if name == "push" and failure is not None:
        # A receiver that woke with the board took in what lay in buffers, at most all of it: that is not sent again.
        assert again.pop("artifact.onnx", [ARTIFACT_BYTES]) >= (resumed_from or [0])
        again.pop(f"artifact.onnx{MANIFEST_SUFFIX}", None)
    if what.kind == "onnx":  # else the next try is of another format, under another name
        assert again == {}, "what is whole is not sent again"
    shutil.rmtree(board.work / "rankship/artifacts", ignore_errors=True)  # the disk is small


def test_a_trial_in_which_the_board_slowed_itself_down_does_not_count(board: NetworkedBoard, tmp_path: Path) -> None:
    step = Step("measure", tmp_path, board, lambda: throttle(board), before=False)
    try:
        with open_session(board.device, on_news=step.hear) as held:
            step.prepare(held)
            step.act(held)
            held.forget(step.ticket)
    finally:
        recover_speed(board)
    assert step.trial is not None
    assert "throttled" in judge_trial(step.trial)
    assert type(refuse_trials("run", [step.trial])) is Throttled
    assert left_by_steps(board) == []


def is_as_expected(board: NetworkedBoard, failure: TargetError | None, expected: type[TargetError] | None) -> bool:
    """Compare by class; a phone lost over adb may also be unreachable, as soon as adb itself has noticed."""
    if board.way == "adb" and expected is ConnectionLost:
        return isinstance(failure, ConnectionLost)
    return type(failure) is (type(None) if expected is None else expected)


def note_figures(way: str, fault: str, step: str, failure: TargetError | None, seconds: float, retries: int) -> None:
    """Add a line to the file of figures, where one is wanted."""
    if "RANKSHIP_FAULT_FIGURES" in os.environ:
        line = {
            "way": way,
            "fault": fault,
            "step": step,
            "outcome": "recovered" if failure is None else type(failure).__name__,
            "seconds": round(seconds, 2),
            "retries": retries,
            "message": str(failure or ""),
            "hint": failure.hint if failure else "",
            "true_limits": TRUE_LIMITS,
        }
        with Path(os.environ["RANKSHIP_FAULT_FIGURES"]).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
