"""Builds a kit for a device's system and keeps it on this host."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_targets.kit.bundle import build_bundle
from rankship_targets.kit.compile import PROGRAM, build_runner, pack_runner
from rankship_targets.kit.lock import KitLock, describe_file, keep_kit, kits_folder
from rankship_targets.kit.system import Board, Phone
from rankship_targets.kit.wheels import download_executorch, download_wheels

RUNNER_ARCHIVE = f"{PROGRAM}.zip"
Say = Callable[[str], None]


def build_kit(system: Board | Phone, device: str, formats: Sequence[Format], say: Say) -> tuple[KitLock, Path]:
    """Build a kit and keep it for the device; the same system and releases give the same kit."""
    kits_folder().mkdir(parents=True, exist_ok=True)
    wanted = [known for known in FORMATS if known in formats]
    with tempfile.TemporaryDirectory(dir=kits_folder(), prefix=".building-") as folder:
        make = _build_for_board if isinstance(system, Board) else build_bundle
        lock = make(system, wanted, Path(folder), say)  # type: ignore[arg-type]  # each gets its own kind of system
        return lock, keep_kit(lock, Path(folder), device)


def _build_for_board(board: Board, formats: Sequence[Format], folder: Path, say: Say) -> KitLock:
    say(f"downloading wheels for {board}")
    runtimes = download_wheels(board, formats, folder)
    if "executorch" in formats:
        say(f"building the ExecuTorch runner for {board.machine}")
        with tempfile.TemporaryDirectory() as scratch:
            wheel = download_executorch(board.machine, Path(scratch))
            build_runner(wheel, board.machine, Path(scratch) / "runner")
            pack_runner(Path(scratch) / "runner", folder / RUNNER_ARCHIVE)
        runtimes["executorch"] = ("executorch", wheel.name.split("-")[1])
    files = [describe_file(path) for path in sorted(folder.iterdir())]
    return KitLock(system=board, runtimes=runtimes, files=tuple(files))
