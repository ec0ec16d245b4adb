"""The stand-in for a Pixel 6: real aarch64 programs of an Android-like system, behind the real adb protocol."""

import atexit
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rankship_pipeline.foundation.errors import Lacks, TargetTimeout
from rankship_pipeline.foundation.frozen import record
from rankship_targets.devices.device import Device
from rankship_targets.transport.adb.client import find_adb
from rankship_targets.twin.adbd import Screen
from rankship_targets.twin.android import STAND_IN, find_root
from rankship_targets.twin.android_files import list_condition_files
from rankship_targets.twin.binfmt import check_machine
from rankship_targets.twin.cache import find_storage
from rankship_targets.twin.ending import end_stand_in
from rankship_targets.twin.phone import SHELL_USER

START_TIMEOUT_S = 60.0
_LOG_CHARACTERS = 2000
_POLL_S = 0.05


def start_pixel(device: Device) -> Device:
    """Start the phone, unless this process already runs it for this name; returns the device that reaches it."""
    with _turn:
        phone = _running.get(device.name)
        if phone is None or phone.process.poll() is not None:
            phone = _running[device.name] = launch_phone(storage=find_storage(device.name))
    return reach(phone, device)


@record
class Phone:
    """A running stand-in; in `folder`, data/ is what the device can write and condition/ its condition."""

    process: subprocess.Popen[bytes]
    folder: Path
    port: int
    server_port: int

    def stop(self) -> None:
        """End the phone and its adb server at once; without a storage, what was written is lost."""
        end_stand_in(self.process, self.folder)


def launch_phone(screen: Screen = "open", storage: Path | None = None) -> Phone:
    """Start a phone; it ends with this process. What is written to it is kept only in a `storage`."""
    check_machine(STAND_IN)
    root = find_root()
    folder = Path(tempfile.mkdtemp(prefix="rankship-pixel6-"))
    _furnish(folder, storage)
    command = [sys.executable, "-m", "rankship_targets.twin.phone", str(root), str(folder), screen, find_adb()]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    try:
        ports = _await_ports(process, folder)
        _await_server(ports["server"], folder)
    except BaseException:
        end_stand_in(process, folder)
        raise
    phone = Phone(process=process, folder=folder, port=ports["port"], server_port=ports["server"])
    atexit.register(phone.stop)
    return phone


def reach(phone: Phone, device: Device) -> Device:
    """Return the device that reaches this phone, over the phone's own adb server."""
    return replace(
        device, transport="adb", serial=f"127.0.0.1:{phone.port}", host="127.0.0.1", port=phone.server_port, twin=None
    )


_turn = threading.Lock()
_running: dict[str, Phone] = {}


def _furnish(folder: Path, storage: Path | None) -> None:
    """Make the files of one run: the device's writable folders and the files of its condition."""
    data = folder / "data"
    if storage is not None:
        storage.mkdir(parents=True, exist_ok=True)
        data.symlink_to(storage.resolve())
    for place in (folder / "root", data / "local/tmp", folder / "condition"):
        place.mkdir(parents=True, exist_ok=True)
    for name, text in list_condition_files().items():
        file = folder / "condition" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    data.chmod(0o771)
    (data / "local").chmod(0o751)
    (data / "local/tmp").chmod(0o771)
    os.chown(data / "local/tmp", SHELL_USER, SHELL_USER)


def _await_ports(process: subprocess.Popen[bytes], folder: Path) -> dict[str, int]:
    if process.stdout is None:  # it was opened as a pipe
        raise AssertionError
    ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
    if not ready:
        message = f"{STAND_IN} did not start within {START_TIMEOUT_S:g} s"
        raise TargetTimeout(message, hint="check whether the machine is overloaded")
    line = process.stdout.readline()
    if not line:
        said = (folder / "log").read_text(encoding="utf-8", errors="replace").strip()[-_LOG_CHARACTERS:]
        message = f"{STAND_IN} did not start: {said}"
        raise Lacks(message, hint="it needs root, Linux 6.7 or newer, and user namespaces allowed")
    ports: dict[str, int] = json.loads(line)
    return ports


def _await_server(port: int, folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(_POLL_S)
    said = (folder / "adb.log").read_text(encoding="utf-8", errors="replace").strip()[-_LOG_CHARACTERS:]
    message = f"the adb server of {STAND_IN} did not start: {said}"
    raise TargetTimeout(message, hint="check whether the machine is overloaded")
