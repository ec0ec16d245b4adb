"""The system stand-in for a Raspberry Pi 4: a virtual machine with four Cortex-A72 cores and its own kernel.

It really boots and reboots, its memory figures are real, and its network can be degraded from inside (sch_netem is
loaded). With `icount` it has one core whose clock advances one nanosecond per instruction: times are then
instruction counts.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rankship_pipeline.foundation.errors import Unreachable
from rankship_targets.devices.device import Device
from rankship_targets.twin.banner import await_banner, find_free_port
from rankship_targets.twin.debian_root import PYTHON, USER, read_public_key
from rankship_targets.twin.ending import end_stand_in
from rankship_targets.twin.machine_files import QEMU, describe_machine, find_machine_files

BOOT_TIMEOUT_S = 180.0
_CORES, _COUNTING_CORES = 4, 1
_APPEND = "console=ttyAMA0 quiet mitigations=off audit=0 panic=5"


@dataclass(frozen=True)
class Machine:
    """A booted machine; it ends with this process at the latest, and what was written to its disk is lost."""

    device: Device
    icount: bool
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def serial_log(self) -> Path:
        """The output of the kernel and the first program; it is gone after `stop`."""
        return self.folder / "serial.log"

    def await_answer(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until the machine's SSH server answers, as after a reboot; else Unreachable with its last output."""
        if not await_banner(self.device.port, alive=lambda: self.process.poll() is None, timeout_s=timeout_s):
            logs = [path.read_text(errors="replace")[-1000:] for path in (self.serial_log, self.folder / "qemu.log")]
            message = f"{self.device.name} did not answer within {timeout_s:g} s: {' '.join(logs).strip()}"
            raise Unreachable(message, hint="the machine's last output is above")

    def stop(self) -> None:
        """Stop the machine at once, as if its plug were pulled; stopping twice is allowed."""
        end_stand_in(self.process, self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def boot(*, icount: bool = False, name: str = "system-pi") -> Machine:
    """Boot a machine and wait until its SSH server answers; the result's `device` reaches it."""
    made = find_machine_files()
    port = find_free_port()
    folder = Path(tempfile.mkdtemp(prefix="rankship-machine-"))
    argv = [
        sys.executable,
        "-m",
        "rankship_targets.twin.warden",
        str(os.getpid()),
        *_command(made, folder, port, icount),
    ]
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    device = Device(
        name=name,
        transport="ssh",
        host="127.0.0.1",
        port=port,
        user=USER,
        host_key=read_public_key(made / "keys/host"),
        key_file=str(made / "keys/user"),
        python=PYTHON,
    )
    machine = Machine(device=device, icount=icount, process=process, folder=folder)
    try:
        machine.await_answer()
    except BaseException:
        machine.stop()
        raise
    return machine


def _command(made: Path, folder: Path, port: int, icount: bool) -> list[str]:  # noqa: FBT001 - as boot says it
    cores = _COUNTING_CORES if icount else _CORES
    argv = [QEMU, "-M", "virt,gic-version=2", *describe_machine(cores), "-monitor", "none"]
    argv += ["-accel", "tcg", "-icount", "shift=0"] if icount else ["-accel", "tcg,thread=multi"]
    argv += ["-dtb", f"{made}/pi-{cores}.dtb", "-kernel", f"{made}/vmlinuz", "-initrd", f"{made}/initrd"]
    argv += ["-append", _APPEND, "-serial", f"file:{folder}/serial.log"]
    argv += ["-drive", f"file={made}/root.img,format=raw,if=none,id=disk,snapshot=on"]
    argv += ["-device", "virtio-blk-pci,drive=disk"]
    argv += ["-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"]
    return [*argv, "-device", "virtio-net-pci,netdev=net,romfile="]  # no boot from the network
