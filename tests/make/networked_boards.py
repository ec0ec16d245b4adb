"""A board with a network, processes and a disk of its own, which can be cut off, stopped, filled and unplugged."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import psutil
import pytest

from make.devices import BOOT_ID, COLD, HEAT, THROTTLED, write_sensors
from make.waiting import wait_until
from rankship_targets.devices.device import Device
from rankship_targets.twin.adbd import Screen
from rankship_targets.twin.banner import find_free_port

DISK_BYTES = 64 << 20
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


class NetworkedBoard:
    """A board on a network of its own, reached by ssh or adb, which ends with this process at the latest."""

    def __init__(self, folder: Path, way: Literal["ssh", "adb"] = "ssh") -> None:
        self.folder = folder
        self.way = way
        self.screen: Screen = "open"
        self.root = folder / "root"
        self.heat, self.boot, self.firmware = self.root / HEAT, self.root / BOOT_ID, self.root / THROTTLED
        write_sensors(self.root, heat=COLD, boot_id="boot 1", throttled="0")
        for key in ("host_key", "other_host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / key], check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized")
        self.python = folder / "python"
        self.set_python(f'RANKSHIP_AGENT_ROOT="{self.root}" exec {sys.executable} "$@"')
        # The range for tests of networks, in nets of four addresses: this process's board has one, its phone the next.
        number = (2 * os.getpid() + (way == "adb")) % 16384
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
        wait_until(lambda: self._has_adb(port))
        return replace(common, serial=f"{self.address}:{ADB_PORT}", host="127.0.0.1", port=port)

    def _has_adb(self, port: int) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        assert self.adb is not None
        assert self.adb.poll() is None, (self.folder / "adb.log").read_text()
        return False

    def _hold(self, host_address: str) -> subprocess.Popen[bytes]:
        """Make the namespaces that outlive the board's restarts, with its disk and its cable."""
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "sleep", "infinity"]
        holder = subprocess.Popen(command, stderr=subprocess.PIPE)
        ours = Path("/proc/self/ns/net").readlink()
        wait_until(lambda: holder.poll() is not None or Path(f"/proc/{holder.pid}/ns/net").readlink() != ours)
        if holder.poll() is not None:
            said = holder.stderr.read().decode() if holder.stderr else ""
            pytest.skip(f"no namespaces here: {said.strip()}")
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

        def listens() -> bool:
            assert self.server is not None
            assert self.server.poll() is None, (self.folder / "log").read_text()
            return "LISTEN" in self.inside("ss -H -l -t -n")

        wait_until(listens)

    def cut_power(self) -> None:
        """End every process of the board at once."""
        if self.server is not None:
            self.server.terminate()
            self.server.wait()
        # its sockets are gone as soon as the processes are
        wait_until(lambda: not self.inside("ss -H -t -n state established; ss -H -l -t -n"))

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
