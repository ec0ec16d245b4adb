"""Faults of boards and phones, injected for real: how each comes and how it goes."""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from make.networked_boards import NetworkedBoard
from rankship_pipeline.foundation.formats import Format

TRUE_LIMITS = os.environ.get("RANKSHIP_FAULT_LIMITS") == "true"
HUNG_S = 420.0 if TRUE_LIMITS else 90.0  # nothing may last so long

# The faults. Each is a pair: how it comes, and how it goes.


def swallow(board: NetworkedBoard) -> None:
    rules = "".join(
        f"add chain inet cut {hook} {{ type filter hook {hook} priority 0; policy drop; }}\n"
        for hook in ("input", "output")
    )
    board.inside(f"nft -f - <<'END'\nadd table inet cut\n{rules}END")


def let_through(board: NetworkedBoard) -> None:
    board.inside("nft flush ruleset")


def freeze(board: NetworkedBoard) -> None:
    for process in board.processes():
        process.suspend()


def thaw(board: NetworkedBoard) -> None:
    for process in board.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end of itself as the others wake
            process.resume()


def reset(board: NetworkedBoard) -> None:
    board.inside("ss -K state established >/dev/null 2>&1 || true")


def nothing(_: NetworkedBoard) -> None:
    pass


def unplug(board: NetworkedBoard) -> None:
    board.cut_power()


def plug_in(board: NetworkedBoard) -> None:
    board.start()


def restart(board: NetworkedBoard) -> None:
    """A power cut, and another boot a moment later."""
    board.cut_power()
    board.boot.write_text(f"boot {time.monotonic_ns()}")
    board.start(after_s=1.0)


def await_start(board: NetworkedBoard) -> None:
    board.await_server()


def refuse_logins(board: NetworkedBoard) -> None:
    (board.folder / "authorized").write_text("")
    reset(board)


def allow_logins(board: NetworkedBoard) -> None:
    shutil.copy(board.folder / "user_key.pub", board.folder / "authorized")


def forget_computer(board: NetworkedBoard) -> None:
    """Have nobody before the phone's screen who accepts this computer's key."""
    board.cut_power()
    board.screen = "ignore"
    board.start()


def accept_computer(board: NetworkedBoard) -> None:
    board.cut_power()
    board.screen = "open"
    board.start()


def pull_cable_briefly(board: NetworkedBoard) -> None:
    """Take the way away for three seconds; the phone itself goes on."""
    swallow(board)
    reset(board)
    threading.Timer(3.0, let_through, (board,)).start()


def change_key(board: NetworkedBoard) -> None:
    board.cut_power()
    text = (board.folder / "sshd_config").read_text()
    (board.folder / "sshd_config").write_text(text.replace("/host_key", "/other_host_key"))
    board.start()


def change_key_back(board: NetworkedBoard) -> None:
    board.cut_power()
    text = (board.folder / "sshd_config").read_text()
    (board.folder / "sshd_config").write_text(text.replace("/other_host_key", "/host_key"))
    board.start()


def fill(board: NetworkedBoard) -> None:
    with contextlib.suppress(OSError), (board.work / "of somebody else").open("wb", buffering=0) as stream:
        while stream.write(bytes(1 << 12)):
            pass


def clear(board: NetworkedBoard) -> None:
    (board.work / "of somebody else").unlink()


def turn_read_only(board: NetworkedBoard) -> None:
    board.inside(f"mount -o remount,ro {board.folder}/work")


def turn_writable(board: NetworkedBoard) -> None:
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


def kill_agent(board: NetworkedBoard) -> None:
    """Kill what works for us there this moment."""
    for process in filter(is_at_work, board.processes()):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end of itself meanwhile
            process.kill()


def kill_next_agent(board: NetworkedBoard) -> None:
    """Kill the next agent as soon as it runs."""

    def watch() -> None:
        deadline = time.monotonic() + HUNG_S
        while time.monotonic() < deadline:
            for process in filter(is_agent, board.processes()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    return
            time.sleep(0.002)  # an agent lives for a tenth of a second: this is the fault itself, no wait for one

    threading.Thread(target=watch, daemon=True).start()


def lose_runtimes(board: NetworkedBoard) -> None:
    board.set_python(f'RANKSHIP_AGENT_ROOT="{board.root}" exec {Path(sys.executable).resolve()} -I -S "$@"')


def find_runtimes(board: NetworkedBoard) -> None:
    board.set_python(f'RANKSHIP_AGENT_ROOT="{board.root}" exec {sys.executable} "$@"')


def throttle(board: NetworkedBoard) -> None:
    board.firmware.write_text("50005")


def recover_speed(board: NetworkedBoard) -> None:
    board.firmware.write_text("0")


def bring_foreign_runner(board: NetworkedBoard) -> None:
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

    come: Callable[[NetworkedBoard], None]
    go: Callable[[NetworkedBoard], None]
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
