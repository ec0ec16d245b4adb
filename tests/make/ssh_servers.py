"""Real OpenSSH servers on the loopback, with keys and configuration of their own.

Their sessions have an empty home, so that nobody's dot files slow or colour the tests.
"""

import contextlib
import getpass
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from make.waiting import wait_until
from rankship_targets.devices.device import Device

SSHD = Path("/usr/sbin/sshd")
CONFIGURATION = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
MaxStartups 100
SetEnv HOME={folder}
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True)
class SshServer:
    """A running server and the inventory entry that reaches it."""

    process: subprocess.Popen[bytes]
    device: Device

    def stop(self) -> None:
        """End the listener and every session, as a power cut would."""
        listener = psutil.Process(self.process.pid)
        for process in [*listener.children(recursive=True), listener]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def greets(port: int) -> bool:
    """Whether an SSH server answers on this port of the loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
        return connection.recv(4) == b"SSH-"
    return False


def start_server(folder: Path, configuration: str, prefix: Sequence[str]) -> SshServer:
    """Start a server with keys of its own in `folder`, behind the command `prefix`; returns once it answers."""
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / key], check=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    (folder / "sshd_config").write_text(configuration.format(port=port, folder=folder))
    with (folder / "log").open("wb") as log:
        command = [*prefix, str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    wait_until(lambda: process.poll() is not None or greets(port), timeout_s=20)
    assert process.poll() is None, f"sshd did not start: {(folder / 'log').read_text()}"
    device = Device(
        name="loopback",
        transport="ssh",
        host="127.0.0.1",
        port=port,
        user=getpass.getuser(),
        host_key=(folder / "host_key.pub").read_text().strip(),
        key_file=str(folder / "user_key"),
    )
    return SshServer(process=process, device=device)
