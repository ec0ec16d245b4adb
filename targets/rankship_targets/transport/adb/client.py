"""Calls the `adb` program of the Android platform tools with a time limit, and turns its messages into errors."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from rankship_pipeline.foundation.errors import (
    AmbiguousDevice,
    ConnectionLost,
    Lacks,
    NoSpace,
    ReadOnly,
    TargetError,
    TargetTimeout,
    Unauthorised,
    Unreachable,
)
from rankship_pipeline.foundation.frozen import record
from rankship_targets.devices.device import Device
from rankship_targets.transport.protocol import Completed

CALL_TIMEOUT_S = 20.0
_TAIL_CHARACTERS = 500
_CABLE = "check that the phone is on, its cable in and USB debugging allowed; `adb devices` lists the phones it sees"
_PROMPT = "unlock the phone and accept the prompt 'Allow USB debugging?' on its screen, then try again"
_AGAIN = "the connection broke: check the cable or the network, then try again"
_SERVER = "another program may hold the server's port: try `adb kill-server`, then `adb start-server`"
_TAIL = re.compile(r"(\s+(usb|product|model|device|transport_id):\S+)+\s*$")
# A bus path like "1-2" may follow the state. A phone paired over Wi-Fi has its mDNS name as serial: "adb-X (2)._adb…".
_STATES = "device|offline|unauthorized|authorizing|connecting|bootloader|recovery|rescue|sideload|host|detached|unknown"
_HEAD = re.compile(rf"(?P<serial>.*\S)\s+(?P<state>{_STATES}|no device)(\s+\S+)?\s*")
_FORBIDDEN = re.compile(r"(?P<serial>.*?\S)\s+(?P<state>no permissions\b.*)")
# Text in adb's message → error class and hint; the first match counts.
_FAULTS: tuple[tuple[str, type[TargetError], str], ...] = (
    ("No space left on device", NoSpace, "free space on the device or choose another workdir in the inventory"),
    ("Read-only file system", ReadOnly, "choose a workdir below /data/local/tmp in the inventory"),
    ("device unauthorized", Unauthorised, _PROMPT),
    ("failed to authenticate", Unauthorised, _PROMPT),
    ("more than one device", AmbiguousDevice, "give each its own serial, or unplug one"),
    ("cannot connect to daemon", Unreachable, _SERVER),
    ("cannot start server on remote host", Unreachable, _SERVER),
    ("device offline", ConnectionLost, _AGAIN),
    ("device still connecting", ConnectionLost, _AGAIN),
    ("device still authorizing", ConnectionLost, _PROMPT),
    ("' not found", Unreachable, _CABLE),
    ("no devices", Unreachable, _CABLE),
    ("error: closed", ConnectionLost, _AGAIN),
    ("protocol fault", ConnectionLost, _AGAIN),
    ("connect failed", ConnectionLost, _AGAIN),
    ("Connection reset", ConnectionLost, _AGAIN),
    ("Broken pipe", ConnectionLost, _AGAIN),
)


class Attached(NamedTuple):
    """One line of `adb devices`: `state` is "device" if it can be used; `model` as the device reports it, or empty."""

    serial: str
    state: str
    model: str = ""


@record
class AdbClient:
    """How to call adb: the program, the server if it is not this machine's usual one, and the device's serial."""

    program: str
    server: tuple[str, int] | None = None
    serial: str | None = None

    def argv(self, *words: str) -> list[str]:
        """Return the whole command."""
        server = ["-H", self.server[0], "-P", str(self.server[1])] if self.server else []
        return [self.program, *server, *(["-s", self.serial] if self.serial else []), *words]

    def call(self, *words: str, timeout_s: float = CALL_TIMEOUT_S) -> Completed:
        """Run adb to its end; after `timeout_s` adb is killed and TargetTimeout raised."""
        # Files, not pipes: a server that adb starts may keep a pipe open forever.
        with TemporaryFile() as stdout, TemporaryFile() as stderr:
            process = subprocess.Popen(self.argv(*words), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                message = f"`adb {words[0]}` did not end within {timeout_s:g} s"
                raise TargetTimeout(message, hint=f"check whether the device answers; {_SERVER}") from None
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            texts = []
            for stream in (stdout, stderr):
                stream.seek(0)
                texts.append(stream.read().decode(errors="replace"))
        return Completed(code=code, stdout=texts[0], stderr=texts[1])


def open_client(device: Device) -> AdbClient:
    """Find adb and start its server; `device.host` and `port` name another server, which must already run."""
    server = (device.host, device.port) if device.host else None
    client = AdbClient(program=find_adb(), server=server, serial=device.serial)
    if server is None:
        ensure_server(client)
    return client


def find_adb() -> str:
    """Return the path of adb, on PATH or below $ANDROID_HOME; Lacks if it is not there."""
    found = shutil.which("adb")
    homes = [os.environ.get(name) for name in ("ANDROID_HOME", "ANDROID_SDK_ROOT")]
    below = [str(path) for home in homes if home and os.access(path := Path(home, "platform-tools", "adb"), os.X_OK)]
    for program in ([found] if found else []) + below:
        return program
    message = "this machine lacks `adb`: it is neither on PATH nor in $ANDROID_HOME/platform-tools"
    raise Lacks(message, hint="run `apt-get install adb`, or install Android's platform tools")


def ensure_server(client: AdbClient) -> None:
    """Start this machine's adb server unless it is running."""
    done = client.call("start-server")
    if done.code != 0:
        message = f"cannot start the adb server: {show_end(done)}"
        raise Unreachable(message, hint=_SERVER)


def list_attached(client: AdbClient | None = None) -> tuple[Attached, ...]:
    """List the devices that the adb server sees, in any state."""
    if client is None:
        client = AdbClient(program=find_adb())
        ensure_server(client)
    done = client.call("devices", "-l")
    if done.code != 0:
        raise explain(done, "`adb devices`")
    lines = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith(("List of", "*"))]
    return tuple(read_attached(line) for line in lines)


def read_attached(line: str) -> Attached:
    """Parse one line of `adb devices -l`: a serial, perhaps with blanks, a state, perhaps of several words, details."""
    tail = _TAIL.search(line)
    head, details = (line[: tail.start()], tail.group()) if tail else (line, "")
    model = dict(pair.split(":", 1) for pair in details.split()).get("model", "").replace("_", " ")
    found = _FORBIDDEN.fullmatch(head) or _HEAD.fullmatch(head)
    # A state of a later adb: its name is one word, and then serials with blanks cannot be told.
    serial, state = found.group("serial", "state") if found else [*head.split(maxsplit=1), "", ""][:2]
    return Attached(serial=serial, state=state.strip(), model=model)


def explain(done: Completed, what: str) -> TargetError:
    """Return the error for a call of adb that failed."""
    said = show_end(done)
    for words, kind, hint in _FAULTS:
        if words in said:
            return kind(f"{what}: {said}", hint=hint)
    return ConnectionLost(f"{what}: {said or f'adb ended with status {done.code}'}", hint=_AGAIN)


def show_end(done: Completed) -> str:
    """Return the end of adb's output, on one line."""
    lines: Sequence[str] = (done.stderr + "\n" + done.stdout).splitlines()
    return "; ".join(line.strip() for line in lines if line.strip())[-_TAIL_CHARACTERS:]
