"""Every fault of a board × {probe, push, measure, fetch}, injected for real into a board with namespaces of its own.

The board is a real OpenSSH server, or the stand-in for a phone's daemon behind a real adb, with a network, processes
and mounts of its own: packets are swallowed by nftables, connections reset by the kernel, processes stopped and killed,
its disk filled and turned read-only, all of it killed at once as by a power cut. Each cell names the error or the
recovery. Afterwards nothing is half-written there or here, no lease is left, and the next try works and sends nothing
again that is whole.

RANKSHIP_FAULT_FIGURES=FILE adds a line for each cell, with the seconds it took; RANKSHIP_FAULT_LIMITS=true keeps the
limits that users have (the tests otherwise shorten the waits, not what is waited for).
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

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
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import ArtifactKey, Format, Verified
from rankship_targets.client import calls as client
from rankship_targets.client import detached
from rankship_targets.client.detached import Ticket, make_ticket
from rankship_targets.devices.device import Device
from rankship_targets.session import session
from rankship_targets.session.manifest import SUFFIX as MANIFEST_SUFFIX
from rankship_targets.session.manifest import sign_artifact
from rankship_targets.session.session import Session, open_session
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
from rankship_targets.trials.request import MeasureRequest
from rankship_targets.trials.trial import Trial
from rankship_targets.twin.adbd import Screen
from rankship_targets.twin.banner import find_free_port

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
HOT, COLD = "90000", "40000"
DISK_BYTES = 64 << 20
ARTIFACT_BYTES, TOLD_BYTES = 12_000_000, 5_000_000  # a push is disturbed once so many bytes are on their way
WIDTH, OUTPUTS, SAMPLES = 8, 50_000, 80  # outputs of 16 MB come home
TRUE_LIMITS = os.environ.get("RANKSHIP_FAULT_LIMITS") == "true"
MEASURE_TIMEOUT_S = 60.0 if TRUE_LIMITS else 15.0
HUNG_S = 420.0 if TRUE_LIMITS else 90.0  # nothing may last so long
CONFIGURATION = """
ListenAddress {address}
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
MaxStartups 100
SetEnv HOME={folder}/work
"""


# The phone's daemon as a program of this machine: what is injected here is the way's trouble, not Android's.
ADB_PORT = 15555  # one of adb's own would be taken for an emulator's
DAEMON = """
import asyncio, os, sys
from rankship_targets.twin import adbd_shell
from rankship_targets.twin.adbd import Adbd

async def serve(host, port, screen):
    server = await asyncio.start_server(Adbd(screen).serve, host, int(port))
    await server.serve_forever()

adbd_shell.SHELL = "/bin/sh"
adbd_shell.ENVIRONMENT = dict(os.environ)
asyncio.run(serve(*sys.argv[1:]))
"""


class Board:
    """A board on a network of its own, reached by ssh or adb, which ends with this process at the latest."""

    def __init__(self, folder: Path, way: Literal["ssh", "adb"] = "ssh") -> None:
        self.folder = folder
        self.way = way
        self.screen: Screen = "open"
        self.root = folder / "root"
        self.heat = self.root / "sys/class/thermal/thermal_zone0/temp"
        self.boot = self.root / "proc/sys/kernel/random/boot_id"
        self.firmware = self.root / "sys/devices/platform/soc/soc:firmware/get_throttled"
        for path, text in ((self.heat, COLD), (self.boot, "boot 1"), (self.firmware, "0")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for key in ("host_key", "other_host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / key], check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized")
        self.python = folder / "python"
        self.set_python(f'RANKSHIP_AGENT_ROOT="{self.root}" exec {sys.executable} "$@"')
        number = os.getpid() % 16384  # the range for tests of networks, in nets of four addresses
        net = f"198.{18 + number // 8192}.{number % 8192 // 64}"
        self.interface, self.address = f"rs{'p' if way == 'adb' else 'b'}{number}", f"{net}.{number % 64 * 4 + 2}"
        self.holder = self._hold(f"{net}.{number % 64 * 4 + 1}")
        self.work = Path(f"/proc/{self.holder.pid}/root{folder}/work")  # as the board sees it
        (folder / "sshd_config").write_text(CONFIGURATION.format(address=self.address, folder=folder))
        (folder / "daemon.py").write_text(DAEMON)
        (folder / "getprop").write_text("#!/bin/sh\necho build\n")
        (folder / "getprop").chmod(0o755)
        self.server: subprocess.Popen[bytes] | None = None
        self.adb: subprocess.Popen[bytes] | None = None
        self.start()
        common = Device(
            name="board",
            transport=way,
            python=str(self.python),
            workdir=str(folder / "work/rankship"),
            cool_below_mc=50_000,
        )
        self.device = self._reach_by_adb(common) if way == "adb" else self._reach_by_ssh(common)

    def _reach_by_ssh(self, common: Device) -> Device:
        key = (self.folder / "host_key.pub").read_text().strip()
        return replace(common, host=self.address, user="root", host_key=key, key_file=str(self.folder / "user_key"))

    def _reach_by_adb(self, common: Device) -> Device:
        """Start an adb server of our own, which knows nobody's keys."""
        port = find_free_port()
        environment = {**os.environ, "HOME": str(self.folder), "ADB_LOCAL_TRANSPORT_MAX_PORT": "5553"}
        command = [sys.executable, "-m", "rankship_targets.twin.warden", str(os.getpid()), "adb"]
        with (self.folder / "adb.log").open("wb") as log:
            argv = [*command, "-L", f"tcp:localhost:{port}", "nodaemon", "server"]
            self.adb = subprocess.Popen(argv, stdout=log, stderr=log, env=environment)
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert self.adb.poll() is None, (self.folder / "adb.log").read_text()
            time.sleep(0.05)
        return replace(common, serial=f"{self.address}:{ADB_PORT}", host="127.0.0.1", port=port)

    def _hold(self, host_address: str) -> subprocess.Popen[bytes]:
        """Make the namespaces that outlive the board's restarts, with its disk and its cable."""
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "sleep", "infinity"]
        holder = subprocess.Popen(command, stderr=subprocess.PIPE)
        ours = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == ours:
            if holder.poll() is not None:
                said = holder.stderr.read().decode() if holder.stderr else ""
                pytest.skip(f"no namespaces here: {said.strip()}")
            time.sleep(0.01)
        self.holder = holder
        (self.folder / "work").mkdir()
        ends = ["type", "veth", "peer", "name", "eth0", "netns", str(holder.pid)]
        subprocess.run(["ip", "link", "add", self.interface, *ends], check=True)
        subprocess.run(["ip", "address", "add", f"{host_address}/30", "dev", self.interface], check=True)
        subprocess.run(["ip", "link", "set", self.interface, "up"], check=True)
        self.inside(
            f"ip link set lo up; ip address add {self.address}/30 dev eth0; ip link set eth0 up; "
            "tc qdisc add dev eth0 root tbf rate 100mbit burst 64k latency 100ms; "
            f"mount -t tmpfs -o size={DISK_BYTES} disk {self.folder}/work"
        )
        return holder

    def inside(self, script: str) -> str:
        """Run a script as the board's owner would at its console."""
        command = ["nsenter", "-t", str(self.holder.pid), "--net", "--mount", "sh", "-e", "-c", script]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def start(self, after_s: float = 0.0) -> None:
        """Power the board up; without a pause before, wait until its server listens."""
        # Its warden ends it with this process; a signal on the parent's death would come when the thread ends.
        warden = [sys.executable, "-m", "rankship_targets.twin.warden", str(os.getpid())]
        enter = ["nsenter", "-t", str(self.holder.pid), "--net", "--mount"]
        first = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        serve = f"exec /usr/sbin/sshd -D -e -f {self.folder}/sshd_config"
        if self.way == "adb":
            daemon = f"{sys.executable} {self.folder}/daemon.py {self.address} {ADB_PORT} {self.screen}"
            serve = f"cd {self.folder}/work; PATH={self.folder}:$PATH exec {daemon}"
        boot = f"sleep {after_s}; {serve}"
        with (self.folder / "log").open("ab") as log:
            self.server = subprocess.Popen([*warden, *enter, *first, "sh", "-c", boot], stdout=log, stderr=log)
        if not after_s:
            self.await_server()

    def await_server(self) -> None:
        """Wait until the board's server listens."""
        while "LISTEN" not in self.inside("ss -H -l -t -n"):
            assert self.server is not None
            assert self.server.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.02)

    def cut_power(self) -> None:
        """End every process of the board at once."""
        if self.server is not None:
            self.server.terminate()
            self.server.wait()
        while self.inside("ss -H -t -n state established; ss -H -l -t -n"):  # gone as soon as the processes are
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on the board."""
        assert self.server is not None
        running = []
        for one in psutil.Process(self.server.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end of itself meanwhile
                if one.name() != "unshare":
                    running.append(one)
        return running

    def set_python(self, words: str) -> None:
        """Choose what the interpreter of the inventory starts."""
        self.python.write_text(f"#!/bin/sh\n{words}\n")
        self.python.chmod(0o755)

    def stop(self) -> None:
        """Take the board away."""
        self.cut_power()
        if self.adb is not None:
            self.adb.terminate()
            self.adb.wait()
        self.holder.kill()
        self.holder.wait()
        assert self.holder.stderr is not None
        self.holder.stderr.close()


# The faults. Each is a pair: how it comes, and how it goes.


def swallow(board: Board) -> None:
    rules = "".join(
        f"add chain inet cut {hook} {{ type filter hook {hook} priority 0; policy drop; }}\n"
        for hook in ("input", "output")
    )
    board.inside(f"nft -f - <<'END'\nadd table inet cut\n{rules}END")


def let_through(board: Board) -> None:
    board.inside("nft flush ruleset")


def freeze(board: Board) -> None:
    for process in board.processes():
        process.suspend()


def thaw(board: Board) -> None:
    for process in board.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end of itself as the others wake
            process.resume()


def reset(board: Board) -> None:
    board.inside("ss -K state established >/dev/null 2>&1 || true")


def nothing(_: Board) -> None:
    pass


def unplug(board: Board) -> None:
    board.cut_power()


def plug_in(board: Board) -> None:
    board.start()


def restart(board: Board) -> None:
    """A power cut, and another boot a moment later."""
    board.cut_power()
    board.boot.write_text(f"boot {time.monotonic_ns()}")
    board.start(after_s=1.0)


def await_start(board: Board) -> None:
    board.await_server()


def refuse_logins(board: Board) -> None:
    (board.folder / "authorized").write_text("")
    reset(board)


def allow_logins(board: Board) -> None:
    shutil.copy(board.folder / "user_key.pub", board.folder / "authorized")


def forget_computer(board: Board) -> None:
    """Have nobody before the phone's screen who accepts this computer's key."""
    board.cut_power()
    board.screen = "ignore"
    board.start()


def accept_computer(board: Board) -> None:
    board.cut_power()
    board.screen = "open"
    board.start()


def pull_cable_briefly(board: Board) -> None:
    """Take the way away for three seconds; the phone itself goes on."""
    swallow(board)
    reset(board)
    threading.Timer(3.0, let_through, (board,)).start()


def change_key(board: Board) -> None:
    board.cut_power()
    text = (board.folder / "sshd_config").read_text()
    (board.folder / "sshd_config").write_text(text.replace("/host_key", "/other_host_key"))
    board.start()


def change_key_back(board: Board) -> None:
    board.cut_power()
    text = (board.folder / "sshd_config").read_text()
    (board.folder / "sshd_config").write_text(text.replace("/other_host_key", "/host_key"))
    board.start()


def fill(board: Board) -> None:
    with contextlib.suppress(OSError), (board.work / "of somebody else").open("wb", buffering=0) as stream:
        while stream.write(bytes(1 << 12)):
            pass


def clear(board: Board) -> None:
    (board.work / "of somebody else").unlink()


def turn_read_only(board: Board) -> None:
    board.inside(f"mount -o remount,ro {board.folder}/work")


def turn_writable(board: Board) -> None:
    board.inside(f"mount -o remount,rw {board.folder}/work")


def is_agent(process: psutil.Process) -> bool:
    """Tell an agent, unless it only reads a run's events."""
    with contextlib.suppress(psutil.NoSuchProcess):
        words = " ".join(process.cmdline())
        return process.name().startswith("python") and ".pyz" in words and '"fetch"' not in words
    return False


def is_at_work(process: psutil.Process) -> bool:
    """Tell an agent or the board's end of a copy."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return is_agent(process) or process.name() == "cat" or "hashlib" in " ".join(process.cmdline()[:6])
    return False


def kill_agent(board: Board) -> None:
    """Kill what works for us there this moment."""
    for process in filter(is_at_work, board.processes()):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end of itself meanwhile
            process.kill()


def kill_next_agent(board: Board) -> None:
    """Kill the next agent as soon as it runs."""

    def watch() -> None:
        deadline = time.monotonic() + HUNG_S
        while time.monotonic() < deadline:
            for process in filter(is_agent, board.processes()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    return
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()


def lose_runtimes(board: Board) -> None:
    board.set_python(f'RANKSHIP_AGENT_ROOT="{board.root}" exec {Path(sys.executable).resolve()} -I -S "$@"')


def find_runtimes(board: Board) -> None:
    board.set_python(f'RANKSHIP_AGENT_ROOT="{board.root}" exec {sys.executable} "$@"')


def throttle(board: Board) -> None:
    board.firmware.write_text("50005")


def recover_speed(board: Board) -> None:
    board.firmware.write_text("0")


def bring_foreign_runner(board: Board) -> None:
    """Install a runner that is a whole program, of another processor."""
    program = bytearray(Path("/bin/true").resolve().read_bytes())
    program[18:20] = (62 if os.uname().machine == "aarch64" else 183).to_bytes(2, "little")
    runner = board.folder / "runner"
    runner.write_bytes(program)
    runner.chmod(0o755)
    board.set_python(
        f'RANKSHIP_EXECUTORCH_RUNNER="{runner}" RANKSHIP_AGENT_ROOT="{board.root}" exec {sys.executable} "$@"'
    )


@dataclass(frozen=True)
class Fault:
    """What goes wrong: how it comes and goes, and when: during the step, or before it begins.

    `first` says that a probe's session is opened under it already. `cuts` that the way to the board is gone, so that
    what was copied so far stays there for the next try.
    """

    come: Callable[[Board], None]
    go: Callable[[Board], None]
    before: bool = False
    first: bool = False
    cuts: bool = False
    kind: Format = "onnx"


FAULTS = {
    "login refused": Fault(refuse_logins, allow_logins, first=True, cuts=True),
    "host key changed": Fault(change_key, change_key_back, first=True, cuts=True),
    "unreachable": Fault(unplug, plug_in, first=True, cuts=True),
    "hung: packets swallowed": Fault(swallow, let_through, cuts=True),
    "hung: processes stopped": Fault(freeze, thaw, cuts=True),
    "reset": Fault(reset, nothing),
    "no space": Fault(fill, clear, first=True),
    "read-only": Fault(turn_read_only, turn_writable, before=True, first=True),
    "agent killed": Fault(kill_agent, nothing),
    "agent killed at its start": Fault(kill_next_agent, nothing, before=True),
    "rebooted": Fault(restart, await_start, cuts=True),
    "missing runtime": Fault(lose_runtimes, find_runtimes, before=True, first=True),
    "wrong ABI": Fault(bring_foreign_runner, find_runtimes, before=True, first=True, kind="executorch"),
}
RECOVERS = None
ADB_FAULTS = {
    "unauthorised": Fault(forget_computer, accept_computer, first=True, cuts=True),
    "gone": Fault(unplug, plug_in, first=True, cuts=True),
    "cable out for 3 s": Fault(pull_cable_briefly, let_through, cuts=True),
    "frozen adbd": Fault(freeze, thaw, cuts=True),
    "no space": FAULTS["no space"],
    "read-only": FAULTS["read-only"],
    "agent killed": FAULTS["agent killed"],
    "rebooted": FAULTS["rebooted"],
}
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


class Step:
    """One step of a session, disturbed once: in the middle of it or before it begins."""

    def __init__(
        self, name: str, folder: Path, board: Board, disturb: Callable[[], None] | None, *, before: bool
    ) -> None:
        self.name = name
        self.into = folder / "home"
        self.ticket: Ticket = make_ticket()
        self.kind: Format = "onnx"
        self.trial: Trial | None = None
        self._board = board
        self._disturb = disturb
        self._before = before
        self._model = make_model(folder)
        self._artifact = folder / "artifact.onnx"
        if name == "push":
            self._artifact.write_bytes(os.urandom(ARTIFACT_BYTES))
        self.into.mkdir()

    def calm(self) -> None:
        """Be disturbed no more."""
        self._disturb, self.kind = None, "onnx"

    def prepare(self, held: Session) -> None:
        """Do what comes before the step."""
        if self.name in {"measure", "fetch"}:
            self._remote = held.push(self._model, prove(self._model, self.kind))
            self._inputs = held.push_file(self._model.with_name("x.npy"))

    def act(self, held: Session) -> None:
        """Do the step and see that its result is right."""
        if self._before:
            self._strike()
        if self.name == "probe":
            held.probe()
        else:
            {"push": self._push, "measure": self._measure, "fetch": self._fetch}[self.name](held)

    def hear(self, news: str) -> None:
        """Take the session's news: the board is too warm, so the measurement is going on and waits."""
        if "cools down" in news:
            self._strike()
            self._board.heat.write_text(COLD)

    def _strike(self) -> None:
        disturb, self._disturb = self._disturb, None
        if disturb is not None:
            disturb()

    def _push(self, held: Session) -> None:
        def hear(sent_bytes: int, _: int) -> None:
            if sent_bytes >= TOLD_BYTES:
                self._strike()

        remote = held.push(self._artifact, prove(self._artifact), on_progress=hear)
        assert hash_file(self._board.work / Path(remote).relative_to(self._board.folder / "work")) == hash_file(
            self._artifact
        )

    def _measure(self, held: Session) -> None:
        if self._disturb is not None:
            self._board.heat.write_text(HOT)
        request = MeasureRequest(
            round=0,
            key=ArtifactKey(variant="dense", format=self.kind),
            artifact=self._remote,
            artifact_sha256=hash_file(self._model),
            inputs=(self._inputs,),
            threads=1,
            min_samples=20,
            min_duration_ms=1,
            max_warmup_ms=500,
            timeout_s=MEASURE_TIMEOUT_S,
        )
        self.trial = held.measure(request, self.ticket)
        assert len(self.trial.samples_ns) >= 20

    def _fetch(self, held: Session) -> None:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.002):
                if any(path.stat().st_size for path in self.into.iterdir()):
                    self._strike()
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            (output,), _ = held.infer(self.kind, self._remote, [self._inputs], self.into)
        finally:
            over.set()
            watcher.join()
        assert np.load(output).shape == (SAMPLES, OUTPUTS)
        output.unlink()


def make_model(folder: Path) -> Path:
    """Make a model of few weights and large outputs, and its inputs beside it."""
    weights = helper.make_tensor("w", TensorProto.FLOAT, [WIDTH, 1], [0.5] * WIDTH)
    ones = helper.make_tensor("s", TensorProto.INT64, [2], [1, OUTPUTS])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Expand", ["h", "s"], ["y"])]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width])
        for name, width in (("x", WIDTH), ("y", OUTPUTS))
    ]
    graph = helper.make_graph(nodes, "wide", values[:1], values[1:], [weights, ones])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), folder / "m.onnx")
    np.save(folder / "x.npy", np.ones((SAMPLES, WIDTH), np.float32))
    return folder / "m.onnx"


def prove(path: Path, kind: Format = "onnx") -> Verified:
    """Sign a file as the parity gate does what it has proven."""
    verified = Verified(
        artifact_sha256=hash_file(path),
        key=ArtifactKey(variant="dense", format=kind),
        runtime="onnxruntime",
        runtime_version="1",
        samples=1,
        max_relative_error=0.0,
        min_cosine=1.0,
        top1_agreement=1.0,
    )
    sign_artifact(path, verified, "0" * 64)
    return verified


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    made = Board(tmp_path_factory.mktemp("board"))
    with open_session(made.device):  # the agent is there from now on
        pass
    yield made
    made.stop()


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    if not shutil.which("adb"):
        pytest.skip("no adb here: apt-get install adb")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("phone")
        patch.setattr(adb_command, "HOME", str(folder / "work"))
        made = Board(folder, "adb")
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


def list_halves(board: Board, step: Step) -> list[str]:
    """List what is not whole on the board: a part that is not its file's beginning, a hash that is not the name's."""
    found = []
    for path in board.work.rglob("*"):
        if path.suffix == ".part":
            content = path.read_bytes()
            if step.name != "push" or not step._artifact.read_bytes().startswith(content):
                found.append(str(path))
        elif path.is_file() and not path.name.endswith(MANIFEST_SUFFIX):
            named = [part for part in (path.stem, path.parent.name) if len(part) == 64]
            if named and hash_file(path) not in named:
                found.append(str(path))
    return found


def left_by_steps(board: Board) -> list[str]:
    """List what no session leaves behind when it ended as it should."""
    work = board.work / "rankship"
    left = [
        *work.rglob("*.part"),
        *work.glob("runs/*"),
        *work.glob("outputs/*"),
        *work.glob("lease"),
    ]
    return [str(path) for path in left]


def name_cell(word: object) -> str:
    """Name a cell's part in the test's name."""
    return str(word).replace(" ", "-")


@pytest.mark.parametrize(("fault", "name"), CELLS, ids=name_cell)
def test_a_fault_ends_in_its_error_or_is_got_over(
    board: Board, sent: Sent, tmp_path: Path, fault: str, name: str
) -> None:
    try_cell(board, sent, tmp_path, fault, name)


@pytest.mark.phone_faults
@pytest.mark.parametrize(("fault", "name"), ADB_CELLS, ids=name_cell)
def test_a_phones_fault_ends_in_its_error_or_is_got_over(
    phone: Board, sent: Sent, tmp_path: Path, fault: str, name: str
) -> None:
    try_cell(phone, sent, tmp_path, fault, name)


def try_cell(board: Board, sent: Sent, tmp_path: Path, fault: str, name: str) -> None:
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
        step._strike()
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


def test_a_trial_in_which_the_board_slowed_itself_down_does_not_count(board: Board, tmp_path: Path) -> None:
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


def is_as_expected(board: Board, failure: TargetError | None, expected: type[TargetError] | None) -> bool:
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
