"""Downloads wheels for another machine's Python with pip, which reads the user's own configuration."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rankship_pipeline.foundation.errors import BuildError, WrongSystem
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_targets.kit.system import Board

TIMEOUT_S = 1800
ALWAYS = {"numpy": "2", "psutil": "7"}
_OLDEST_MANYLINUX = 17


def download_wheels(board: Board, formats: Sequence[Format], into: Path) -> dict[Format, tuple[str, str]]:
    """Download the runtimes of these formats with their dependencies; returns format → (runtime, version)."""
    packaged = {known: FACTS[known] for known in formats if not FACTS[known].kit_compiles}
    wanted = {facts.runtime_distribution: facts.kit_series for facts in packaged.values()}
    _download({**ALWAYS, **wanted}, [], board, into)
    versions = {_name(path): path.name.split("-")[1] for path in into.glob("*.whl")}
    runtimes = {known: facts.runtime_distribution for known, facts in packaged.items()}
    return {known: (name, versions[name]) for known, name in runtimes.items()}


def download_executorch(machine: str, into: Path) -> Path:
    """Download ExecuTorch's wheel without dependencies: its C++ libraries need no Python packages."""
    board = Board(machine="aarch64" if machine == "aarch64" else "x86_64", python=(3, 11), glibc=(2, 36))
    facts = FACTS["executorch"]
    _download({facts.runtime_distribution: facts.kit_series}, ["--no-deps"], board, into)
    (wheel,) = into.glob(f"{facts.runtime_distribution}-*.whl")
    return wheel


def list_platforms(board: Board) -> list[str]:
    """Return every wheel platform that the board's C library can run, the newest first."""
    newest = board.glibc[1]
    named = [f"manylinux_2_{minor}_{board.machine}" for minor in range(newest, _OLDEST_MANYLINUX - 1, -1)]
    return [*named, f"manylinux2014_{board.machine}"]


def _download(wanted: Mapping[str, str], options: Sequence[str], board: Board, into: Path) -> None:
    """Download the versions installed on this host, which artifacts are verified with; or else the newest."""
    try:
        _call_pip([f"{name}{_pin(name, series)}" for name, series in wanted.items()], options, board, into)
    except WrongSystem:
        _call_pip([f"{name}=={series}.*" for name, series in wanted.items()], options, board, into)


def _pin(name: str, series: str) -> str:
    try:
        ours = version(name).partition("+")[0]
    except PackageNotFoundError:
        ours = ""
    return f"=={ours}" if ours.startswith(f"{series}.") else f"=={series}.*"


def _call_pip(wanted: Sequence[str], more: Sequence[str], board: Board, into: Path) -> None:
    python = "".join(map(str, board.python))
    target = ["--python-version", python, "--implementation", "cp"]
    target += [argument for abi in (f"cp{python}", "abi3", "none") for argument in ("--abi", abi)]
    target += [argument for platform in list_platforms(board) for argument in ("--platform", platform)]
    options = ["--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--progress-bar=off", "--dest"]
    argv = [sys.executable, "-m", "pip", "download", *options, str(into), *target, *more, *wanted]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        try:
            done = subprocess.run(
                argv, stdout=said, stderr=said, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise BuildError(
                f"pip did not end within {TIMEOUT_S} s", hint="check whether the package index answers"
            ) from None
        said.seek(0)
        text = said.read()
    if done.returncode != 0:
        raise _explain(text, board)


def _explain(text: str, board: Board) -> BuildError | WrongSystem:
    errors = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR:")]
    message = "; ".join(errors) or text.strip()[-500:]
    if any("No matching distribution" in line for line in errors) and "Connection" not in text:
        hint = "check the device's Python: the runtimes are published for 3.11 and 3.13, for example"
        return WrongSystem(f"no wheels for {board}: {message[:500]}", hint=hint)
    return BuildError(f"pip could not download the wheels for {board}: {message}", hint="pip's own message is above")


def _name(wheel: Path) -> str:
    return wheel.name.split("-")[0].replace("_", "-").lower()
