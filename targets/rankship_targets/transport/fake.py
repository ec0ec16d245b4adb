"""A device in memory: files, folders and a table of commands, for tests that need no real device."""

import hashlib
import posixpath
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rankship_pipeline.foundation.errors import CommandFailed, TargetError, TargetTimeout
from rankship_targets.transport.copying import LOOK
from rankship_targets.transport.lease import HELD, NAME, TAKE
from rankship_targets.transport.protocol import NOT_FOUND, Completed, explain_failure, open_source, split_lines

Handler = Callable[["FakeTransport", Sequence[str]], Completed]


class FakeTransport:
    """Behaves like a small Linux device; `handlers` add commands or replace the built-in ones.

    `files` and `folders` hold normalised paths. Time never passes: `sleep N` times out at once if N exceeds the limit.
    """

    def __init__(self, handlers: Mapping[str, Handler] | None = None, *, capacity_bytes: int = 1 << 30) -> None:
        self.files: dict[str, bytes] = {}
        self.folders: set[str] = {".", "/"}
        self.calls: list[tuple[str, ...]] = []
        self._handlers = {**COMMANDS, **(handlers or {})}
        self._capacity_bytes = capacity_bytes
        self._failures: list[TargetError] = []

    def fail_next(self, *failures: TargetError) -> None:
        """Raise these errors, one per call, instead of carrying out the next calls."""
        self._failures.extend(failures)

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a command of the table."""
        self._meet_failure(*argv)
        if argv[0] == "sleep" and float(argv[1]) > timeout_s:
            raise TargetTimeout(f"sleep did not end within {timeout_s:g} s", hint="it was ended")
        if argv[0] not in self._handlers:
            return Completed(code=NOT_FOUND, stdout="", stderr=f"{argv[0]}: not found\n")
        return self._handlers[argv[0]](self, list(argv))

    def stream(self, argv: Sequence[str], *, timeout_s: float) -> Generator[str, None, None]:
        """Yield the lines of stdout, then raise the command's failure."""
        done = self.run(argv, timeout_s=timeout_s)
        yield from split_lines([done.stdout.encode()])
        if done.code != 0:
            raise explain_failure(argv, done.code, done.stderr)

    def feed(
        self,
        argv: Sequence[str],
        local: Path,
        *,
        offset: int = 0,
        timeout_s: float,  # noqa: ARG002 - time never passes
        on_progress: Callable[[int], None] | None = None,
    ) -> Completed:
        """Receive a file, as `receive` sends it; an error of `fail_next` is raised halfway."""
        with open_source(local) as source:
            content = source.read()
        part, _, sha256, name, *_ = argv[4:]
        part, place = posixpath.normpath(part), posixpath.normpath(name)
        if (posixpath.dirname(part) or ".") not in self.folders:
            return _refuse(f"{part}: No such file or directory")
        rest = content[offset:]
        self.files[part] = self.files.get(part, b"")[:offset] + rest[: len(rest) // 2]
        self._meet_failure("feed", part)
        if len(rest) - len(rest) // 2 > self._room_bytes():
            return _refuse(f"{part}: No space left on device")
        self.files[part] += rest[len(rest) // 2 :]
        if on_progress:
            on_progress(len(content))
        return self._give_name(part, sha256, place)

    def _give_name(self, part: str, sha256: str, place: str) -> Completed:
        """Rename a part whose hash is right; prints the hash."""
        arrived = hashlib.sha256(self.files.get(part, b"")).hexdigest()
        if arrived == sha256:
            self.files[place] = self.files.pop(part)
        return _say(f"{arrived}\n")

    def fetch(self, remote: str, local: Path) -> None:
        """Copy a file of the device to `local`."""
        self._meet_failure("fetch", remote)
        if posixpath.normpath(remote) not in self.files:
            raise CommandFailed(f"fetching {remote}: no such file", hint="check that the path exists")
        local.write_bytes(self.files[posixpath.normpath(remote)])

    def free_bytes(self, folder: str) -> int:
        """Return the capacity minus the size of all files."""
        self._meet_failure("free_bytes", folder)
        if posixpath.normpath(folder) not in self.folders:
            raise CommandFailed(f"free space of {folder}: no such folder", hint="make the folder first")
        return self._room_bytes()

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _room_bytes(self) -> int:
        return self._capacity_bytes - sum(map(len, self.files.values()))

    def _meet_failure(self, *call: str) -> None:
        self.calls.append(call)
        if self._failures:
            raise self._failures.pop(0)


def _paths(argv: Sequence[str]) -> list[str]:
    """Return the operands of a command written as `name -options -- paths`, normalised."""
    operands = argv[argv.index("--") + 1 :] if "--" in argv else argv[1:]
    return [posixpath.normpath(path) for path in operands]


def _say(text: str) -> Completed:
    return Completed(code=0, stdout=text, stderr="")


def _refuse(why: str) -> Completed:
    return Completed(code=1, stdout="", stderr=f"{why}\n")


def _miss(name: str, path: str) -> Completed:
    return Completed(code=1, stdout="", stderr=f"{name}: {path}: No such file or directory\n")


def _cat(device: FakeTransport, argv: Sequence[str]) -> Completed:
    (path,) = _paths(argv)
    return _say(device.files[path].decode(errors="replace")) if path in device.files else _miss("cat", path)


def _hash(device: FakeTransport, argv: Sequence[str]) -> Completed:
    names = argv[argv.index("--") + 1 :]
    found = {name: device.files.get(posixpath.normpath(name)) for name in names}
    lines = [
        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in found.items() if content is not None
    ]
    missed = [f"sha256sum: {name}: No such file or directory\n" for name, content in found.items() if content is None]
    return Completed(code=1 if missed else 0, stdout="".join(lines), stderr="".join(missed))


def _mkdir(device: FakeTransport, argv: Sequence[str]) -> Completed:
    for path in _paths(argv):
        if "-p" not in argv and (path in device.folders or path in device.files):
            return Completed(code=1, stdout="", stderr=f"mkdir: {path}: File exists\n")
        folder = path
        while folder not in device.folders:
            device.folders.add(folder)
            folder = (posixpath.dirname(folder) or ".") if "-p" in argv else "."
    return _say("")


def _look(device: FakeTransport, names: Sequence[str]) -> Completed:
    _mkdir(device, ["mkdir", "-p", "--", names[1]])
    content = device.files.get(posixpath.normpath(names[0]))
    if content is None:
        return _miss("stat", names[0])
    return _say(f"{len(content)}\n{hashlib.sha256(content).hexdigest()}  -\n")


def _take(device: FakeTransport, names: Sequence[str]) -> Completed:
    if names[0] in device.folders:
        return Completed(code=HELD, stdout="", stderr=f"mkdir: {names[0]}: File exists\n")
    device.folders.add(names[0])
    return _name(device, names)


def _name(device: FakeTransport, names: Sequence[str]) -> Completed:
    _, text, note = names
    device.files[note] = text.encode()
    return _say("")


# The scripts that copying.py and lease.py run, recognised by their text.
_SCRIPTS: dict[str, Callable[[FakeTransport, Sequence[str]], Completed]] = {
    LOOK: _look,
    TAKE: _take,
    NAME: _name,
}


def _run_script(device: FakeTransport, argv: Sequence[str]) -> Completed:
    return _SCRIPTS[argv[2]](device, argv[4:])


def _move(device: FakeTransport, argv: Sequence[str]) -> Completed:
    source, target = _paths(argv)
    if source not in device.files:
        return _miss("mv", source)
    device.files[target] = device.files.pop(source)
    return _say("")


def _remove(device: FakeTransport, argv: Sequence[str]) -> Completed:
    for path in _paths(argv):
        for known in [name for name in device.files if name == path or name.startswith(path + "/")]:
            del device.files[known]
        device.folders = {name for name in device.folders if name != path and not name.startswith(path + "/")}
    return _say("")


# The commands of copying.py and the contract suite; a test that needs others passes them as `handlers`.
COMMANDS: dict[str, Handler] = {
    "true": lambda _, __: _say(""),
    "false": lambda _, __: Completed(code=1, stdout="", stderr=""),
    "printf": lambda _, argv: _say("".join(argv[2:])),  # supports only the format %s
    "cat": _cat,
    "sha256sum": _hash,
    "mkdir": _mkdir,
    "mv": _move,
    "sh": _run_script,
    "find": lambda _, __: _say(""),  # no file here ever grows old
    "rm": _remove,
    "sleep": lambda _, __: _say(""),
}
