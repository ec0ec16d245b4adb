"""adbd's shell: one command per stream; its second version separates stdout, stderr and the exit status."""

import asyncio
import os
import signal
import struct
from asyncio.subprocess import PIPE, STDOUT, Process
from contextlib import suppress
from enum import IntEnum

from rankship_targets.twin.adbd_wire import Stream

SHELL = "/system/bin/sh"
ENVIRONMENT = {
    "PATH": "/product/bin:/apex/com.android.runtime/bin:/system/bin:/system/xbin:/vendor/bin",
    "HOME": "/",
    "SHELL": SHELL,
    "ANDROID_DATA": "/data",
    "ANDROID_ROOT": "/system",
    "TMPDIR": "/data/local/tmp",
    "USER": "shell",
    "LOGNAME": "shell",
    "HOSTNAME": "oriole",
    "TERM": "dumb",
}
_CHUNK = 1 << 15


class Packet(IntEnum):
    """The content of a packet of the second version."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    EXIT = 3
    CLOSE_STDIN = 4


async def run_shell(stream: Stream, command: str, *, packets: bool) -> None:
    """Run a command for a stream; without `packets`, the first version: one output and no exit status."""
    emulation = {key: value for key, value in os.environ.items() if key.startswith("QEMU_")}
    words = ["-c", command] if command else []
    process = await asyncio.create_subprocess_exec(
        SHELL,
        *words,
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE if packets else STDOUT,
        env={**ENVIRONMENT, **emulation},
        start_new_session=True,
    )
    feeder = asyncio.create_task(_feed(stream, process, packets=packets))
    try:
        await asyncio.gather(
            _drain(stream, process.stdout, Packet.STDOUT if packets else None),
            _drain(stream, process.stderr, Packet.STDERR if packets else None),
        )
        code = await process.wait()
        if packets:
            await stream.write(struct.pack("<BIB", Packet.EXIT, 1, code if code >= 0 else 128 - code))
    finally:
        feeder.cancel()
        _let_go(process)


async def _drain(stream: Stream, source: asyncio.StreamReader | None, packet: Packet | None) -> None:
    while source is not None and (content := await source.read(_CHUNK)):
        head = b"" if packet is None else struct.pack("<BI", packet, len(content))
        await stream.write(head + content)


async def _feed(stream: Stream, process: Process, *, packets: bool) -> None:
    """Pass on stdin; when the computer disconnects, send SIGHUP to the shell alone, as adbd does."""
    with suppress(EOFError):
        while True:
            kind, content = await _read_packet(stream) if packets else (Packet.STDIN, await stream.read())
            if not packets and not content:
                break
            if process.stdin is None:
                continue
            if kind == Packet.CLOSE_STDIN:
                process.stdin.close()
            elif kind == Packet.STDIN:
                with suppress(OSError, RuntimeError):
                    process.stdin.write(content)
                    await process.stdin.drain()
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGHUP)
    _let_go(process)


def _let_go(process: Process) -> None:
    """Close all pipes: what the shell started gets the end of its stdin, or SIGPIPE, as under adbd."""
    for end in (0, 1, 2):
        pipe = process._transport.get_pipe_transport(end)  # type: ignore[attr-defined]  # noqa: SLF001 - no other way
        if pipe is not None:
            pipe.close()


async def _read_packet(stream: Stream) -> tuple[int, bytes]:
    kind, size = struct.unpack("<BI", await stream.read_exactly(5))
    return kind, await stream.read_exactly(size)
