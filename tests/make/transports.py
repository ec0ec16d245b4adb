"""Transports under test with their folder, and transports that go wrong."""

import hashlib
import posixpath
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from make.waiting import wait_until
from rankship_pipeline.foundation.errors import (
    ConnectionLost,
)
from rankship_targets.transport.protocol import Completed, Transport

NASTY_NAMES = [
    "plain",
    "two words",
    "-rf",
    "--help",
    'it\'s "quoted"',
    "line\nbreak",
    "back\\slash",
    "$HOME `id` $(id) ; & | > *?[a]",
    "größe-模型-🚀",
    "trailing space ",
]


# Every kind of the fixture `bench` but the fake, and the mark of a test that asks for what the fake does not have.
REAL = ["local", "shell", "ssh", pytest.param("adb", marks=pytest.mark.twin)]
needs_real = pytest.mark.parametrize("bench", REAL, indirect=True)

FLOOD_BYTES = 5_000_000
FLOOD = f"head -c {FLOOD_BYTES} /dev/zero >&2 & head -c {FLOOD_BYTES} /dev/zero; wait"


@dataclass(frozen=True)
class Bench:
    """A transport under test and a folder on its device that the test may fill."""

    transport: Transport
    folder: str
    kind: str

    def place(self, name: str) -> str:
        return posixpath.join(self.folder, name)


def run(bench: Bench, *argv: str, timeout_s: float = 30) -> Completed:
    return bench.transport.run(argv, timeout_s=timeout_s)


def write(folder: Path, content: bytes = b"content", name: str = "file") -> tuple[Path, str]:
    path = folder / name
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def read_pids(bench: Bench) -> list[str]:
    """What a script has noted of its processes so far."""
    return run(bench, "cat", "--", bench.place("pids")).stdout.split()


def assert_gone(bench: Bench) -> None:
    """Wait until both processes that a script has noted are gone."""
    pids = read_pids(bench)
    assert len(pids) == 2
    wait_until(lambda: not any(_is_alive(bench, pid) for pid in pids), timeout_s=10)


def _is_alive(bench: Bench, pid: str) -> bool:
    done = run(bench, "cat", f"/proc/{pid}/stat")
    return done.code == 0 and done.stdout.rpartition(")")[2].split()[0] != "Z"


@dataclass
class Passing:
    """A transport that passes everything on, for others that change one thing."""

    inner: Transport

    def feed(
        self,
        argv: Sequence[str],
        local: Path,
        *,
        offset: int = 0,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> Completed:
        return self.inner.feed(argv, local, offset=offset, timeout_s=timeout_s, on_progress=on_progress)

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        return self.inner.run(argv, timeout_s=timeout_s)

    def stream(self, argv: Sequence[str], *, timeout_s: float) -> Generator[str, None, None]:
        return self.inner.stream(argv, timeout_s=timeout_s)

    def fetch(self, remote: str, local: Path) -> None:
        self.inner.fetch(remote, local)

    def free_bytes(self, folder: str) -> int:
        return self.inner.free_bytes(folder)

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Counting(Passing):
    """Notes from where each file is sent and passes everything on."""

    offsets: list[int] = field(default_factory=list)

    def feed(
        self,
        argv: Sequence[str],
        local: Path,
        *,
        offset: int = 0,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> Completed:
        self.offsets.append(offset)
        return super().feed(argv, local, offset=offset, timeout_s=timeout_s, on_progress=on_progress)


@dataclass
class Faulty(Passing):
    """A transport that damages what it sends, breaks or has hardly any room, and otherwise passes everything on."""

    damage: bytes | None = None
    room_bytes: int | None = None
    refusal: str | None = None
    lacks_sha256sum: bool = False
    breaks_at: int | None = None

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        if self.lacks_sha256sum and argv[0] == "sha256sum":
            return Completed(code=127, stdout="", stderr="")
        return super().run(argv, timeout_s=timeout_s)

    def feed(
        self,
        argv: Sequence[str],
        local: Path,
        *,
        offset: int = 0,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> Completed:
        if self.damage is not None:
            local = local.with_name("damaged")
            local.write_bytes(self.damage)
        if self.breaks_at is not None:
            content, limit = local.read_bytes(), self.breaks_at
            local = local.with_name("shortened")
            local.write_bytes(content[:limit])
            super().feed(argv, local, offset=offset, timeout_s=timeout_s)
            raise ConnectionLost("cable out")
        done = super().feed(argv, local, offset=offset, timeout_s=timeout_s, on_progress=on_progress)
        return done if self.refusal is None else Completed(code=1, stdout="", stderr=self.refusal)

    def free_bytes(self, folder: str) -> int:
        return super().free_bytes(folder) if self.room_bytes is None else self.room_bytes
