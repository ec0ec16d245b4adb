"""A network of its own for a program, behind a wire that can be cut."""

import os
import subprocess
from pathlib import Path
from typing import Self

import pytest

from make.waiting import wait_until


class Wire:
    """Two ends of a wire: `near` is an address of this machine; what is started by `inside` is at the far end.

    The addresses are of the range for tests of networks (RFC 2544), in a net of four that this process has alone.
    """

    def __init__(self) -> None:
        number = os.getpid() % 16384
        net = f"198.{18 + number // 8192}.{128 + number % 8192 // 64}"
        self.near, self._far = f"{net}.{number % 64 * 4 + 1}", f"{net}.{number % 64 * 4 + 2}"
        self._interface = f"rsw{number}"
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
        self._holder = subprocess.Popen(command, stderr=subprocess.PIPE)

    @property
    def inside(self) -> tuple[str, ...]:
        """The words before a command that is to run at the far end."""
        return ("nsenter", "-t", str(self._holder.pid), "--net")

    def cut(self) -> None:
        """Cut the wire: nothing comes through, and nobody is told."""
        self._run("ip", "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Mend the wire."""
        self._run("ip", "link", "set", "eth0", "up")

    def __enter__(self) -> Self:
        holder, ours = self._holder, Path("/proc/self/ns/net").readlink()
        wait_until(lambda: holder.poll() is not None or Path(f"/proc/{holder.pid}/ns/net").readlink() != ours)
        if holder.poll() is not None:
            said = holder.stderr.read().decode() if holder.stderr else ""
            pytest.skip(f"no namespaces here: {said.strip()}")
        ends = ["type", "veth", "peer", "name", "eth0", "netns", str(holder.pid)]
        subprocess.run(["ip", "link", "add", self._interface, *ends], check=True)
        subprocess.run(["ip", "address", "add", f"{self.near}/30", "dev", self._interface], check=True)
        subprocess.run(["ip", "link", "set", self._interface, "up"], check=True)
        self._run("ip", "address", "add", f"{self._far}/30", "dev", "eth0")
        self._run("ip", "link", "set", "lo", "up")
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()  # the wire goes with the network at its far end
        self._holder.wait()
        if self._holder.stderr:
            self._holder.stderr.close()

    def _run(self, *words: str) -> None:
        subprocess.run([*self.inside, *words], check=True)
