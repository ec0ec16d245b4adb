"""The system that a kit is built for: the device's processor, C library and Python, as the device reports them."""

import json
import re
from typing import Literal

from rankship_pipeline.foundation.errors import CommandFailed, Lacks, WrongSystem
from rankship_pipeline.foundation.frozen import record
from rankship_targets.devices.device import Device
from rankship_targets.transport.protocol import STEP_TIMEOUT_S, Completed, Transport, run_checked

Machine = Literal["aarch64", "x86_64"]
OLDEST_GLIBC = (2, 28)  # required by onnxruntime's wheels
_FALLBACK_PYTHON = "python3"
_QUESTION = """
import json, os, platform, struct, sys, sysconfig
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION")
except (ValueError, OSError, AttributeError):
    libc = None
print(json.dumps({
    "machine": platform.machine(),
    "bits": struct.calcsize("P") * 8,
    "libc": libc,
    "python": list(sys.version_info[:2]),
    "implementation": sys.implementation.name + sys.abiflags,
    "interpreter": sys.executable,
}))
"""
_FIELDS = {"machine", "bits", "libc", "python", "implementation", "interpreter"}


@record
class Board:
    """A Linux device with glibc and a Python of its own; `python` and `glibc` are (major, minor)."""

    machine: Machine
    python: tuple[int, int]
    glibc: tuple[int, int]

    def __str__(self) -> str:
        """The system as people write it."""
        return f"{self.machine}, Python {_join(self.python)}, glibc {_join(self.glibc)}"


@record
class Phone:
    """A 64-bit ARM Android device: it has neither glibc nor Python."""

    machine: Literal["aarch64"] = "aarch64"

    def __str__(self) -> str:
        """The system as people write it."""
        return "Android on 64-bit ARM"


def ask_system(transport: Transport, device: Device) -> Board | Phone:
    """Return a device's system; WrongSystem if no kit can be built for it."""
    if device.transport == "adb":
        return _ask_phone(transport, device)
    return ask_board(transport, device)[0]


def ask_board(transport: Transport, device: Device) -> tuple[Board, str]:
    """Return a board's system, and the interpreter that reported it (the inventory's, or else python3)."""
    done = _run_python(transport, device.python)
    if done.code != 0 and device.python != _FALLBACK_PYTHON:  # perhaps that of a kit that was deleted
        done = _run_python(transport, _FALLBACK_PYTHON)
    if done.code != 0:
        message = f"{device.name} cannot start {device.python}: {done.stderr.strip()[-200:]}"
        raise Lacks(message, hint="install Python 3.11 or newer on it: `sudo apt install python3`")
    answer = read_answer(device.name, done.stdout)
    return judge_board(device.name, answer), str(answer["interpreter"])


def read_answer(name: str, said: str) -> dict[str, object]:
    """Parse what a board's Python printed; CommandFailed for anything but the expected answer."""
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or not set(answer) >= _FIELDS:
        message = f"{name}: its Python printed {said[:200]!r}"
        raise CommandFailed(message, hint="check `python` in the inventory: it must print nothing of its own")
    return answer


def judge_board(name: str, answer: dict[str, object]) -> Board:
    """Return the system that a board's answer describes; WrongSystem if no kit can be built for it."""
    machine, bits, libc = answer["machine"], answer["bits"], answer["libc"]
    if bits != 64:  # noqa: PLR2004 - bits of a pointer
        message = f"{name} runs a {bits}-bit Python on {machine}: no runtime is published for it"
        raise WrongSystem(message, hint="install the 64-bit edition of its operating system")
    if not isinstance(machine, str) or machine not in {"aarch64", "x86_64"}:
        raise WrongSystem(f"{name} is a {machine}", hint="kits exist for 64-bit ARM (aarch64) and x86_64")
    if not isinstance(libc, str) or not libc.startswith("glibc "):
        hint = "the runtimes' wheels need glibc: use a Debian-like system (Raspberry Pi OS, Ubuntu)"
        raise WrongSystem(f"{name} has no glibc (its C library is {libc!r})", hint=hint)
    glibc = _parse_version(libc.removeprefix("glibc "))
    if glibc < OLDEST_GLIBC:
        hint = f"the runtimes' wheels need glibc {_join(OLDEST_GLIBC)}: update its operating system"
        raise WrongSystem(f"{name} has glibc {_join(glibc)}", hint=hint)
    if answer["implementation"] != "cpython":
        message = f"{name}'s Python is {answer['implementation']}, not plain CPython"
        raise WrongSystem(message, hint="name a plain CPython as `python` in the inventory")
    python = answer["python"]
    if not isinstance(python, list) or [type(part) for part in python] != [int, int]:
        raise WrongSystem(f"{name} reports its Python as {python!r}", hint="expected two numbers")
    return Board(machine="aarch64" if machine == "aarch64" else "x86_64", python=(python[0], python[1]), glibc=glibc)


def _run_python(transport: Transport, python: str) -> Completed:
    return transport.run([python, "-c", _QUESTION], timeout_s=STEP_TIMEOUT_S)


def _ask_phone(transport: Transport, device: Device) -> Phone:
    abi = run_checked(transport, ["getprop", "ro.product.cpu.abi"]).strip()
    if abi != "arm64-v8a":
        message = f"{device.name} has the ABI {abi or 'unknown'}, kits for phones are built for arm64-v8a"
        raise WrongSystem(message, hint="use a phone with 64-bit Android on ARM, not an x86 emulator")
    return Phone()


def _parse_version(text: str) -> tuple[int, int]:
    found = re.match(r"([0-9]{1,4})\.([0-9]{1,4})(?:[^0-9]|$)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _join(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
