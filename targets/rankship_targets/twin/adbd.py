"""The phone's side of adb over TCP: authorisation, and the service behind each stream."""

import asyncio
import os
from collections.abc import Coroutine
from contextlib import suppress
from typing import Literal

from rankship_targets.twin.adbd_keys import TOKEN_BYTES, PublicKey, is_signed_by, read_key
from rankship_targets.twin.adbd_shell import run_shell
from rankship_targets.twin.adbd_sync import serve_files
from rankship_targets.twin.adbd_wire import MAX_BYTES, VERSION, Stream, Wire
from rankship_targets.twin.android_files import PROPERTIES

# Every feature announced here is implemented: a client uses all that are announced.
FEATURES = "shell_v2,cmd,stat_v2,ls_v2,fixed_push_mkdir"
_TOKEN, _SIGNATURE, _PUBLIC_KEY = 1, 2, 3
_SHOWN = ("ro.product.name", "ro.product.model", "ro.product.device")

# Whether a computer needs a key, and what the phone's user does when a new one connects.
Screen = Literal["open", "accept", "ignore"]


class Adbd:
    """The daemon; all its connections share the accepted keys."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.keys: set[PublicKey] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one computer until it disconnects."""
        await _Connection(self, Wire(reader, writer)).run()


class _Connection:
    """One computer's connection."""

    def __init__(self, phone: Adbd, wire: Wire) -> None:
        self._phone = phone
        self._wire = wire
        self._token = b""
        self._welcome = False
        self._streams: dict[int, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._last = 0

    async def run(self) -> None:
        try:
            async for command, first, second, content in self._wire.packets():
                if command == "CNXN":
                    self._wire.agree(first, second)
                    await (self._greet() if self._phone.screen == "open" else self._send_token())
                elif command == "AUTH":
                    await self._authenticate(first, content)
                elif self._welcome:
                    await self._pass(command, first, second, content)
        finally:
            for stream in self._streams.values():
                stream.abort()
            for task in self._tasks:
                task.cancel()
            self._wire.close()

    async def _authenticate(self, kind: int, content: bytes) -> None:
        if kind == _SIGNATURE:
            known = any(is_signed_by(key, self._token, content) for key in self._phone.keys)
            await (self._greet() if known else self._send_token())  # a new token makes the computer send its key
        elif kind == _PUBLIC_KEY and self._phone.screen == "accept":
            self._phone.keys.add(read_key(content))
            await self._greet()

    async def _send_token(self) -> None:
        self._token = os.urandom(TOKEN_BYTES)
        await self._wire.send("AUTH", _TOKEN, 0, self._token)

    async def _greet(self) -> None:
        self._welcome = True
        shown = "".join(f"{key}={PROPERTIES[key]};" for key in _SHOWN)
        await self._wire.send("CNXN", VERSION, MAX_BYTES, f"device::{shown}features={FEATURES}".encode())

    async def _pass(self, command: str, first: int, second: int, content: bytes) -> None:
        stream = self._streams.get(second)
        if command == "OPEN":
            self._last += 1
            opened = self._streams[self._last] = Stream(self._wire, self._last, first)
            task = asyncio.create_task(self._serve(opened, os.fsdecode(content.rstrip(b"\0"))))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif stream is None:
            if command == "WRTE":
                await self._wire.send("CLSE", 0, first)
        elif command == "WRTE":
            stream.arrive(content)
        elif command == "OKAY":
            stream.confirm()
        elif command == "CLSE":
            self._streams.pop(second).abort()

    async def _serve(self, stream: Stream, destination: str) -> None:
        service = _find_service(stream, destination)
        with suppress(EOFError, ConnectionError):
            if service is not None:
                await self._wire.send("OKAY", stream.local, stream.remote)
                await service
                await stream.close()
            else:
                await self._wire.send("CLSE", 0, stream.remote)
        stream.abort()
        self._streams.pop(stream.local, None)


def _find_service(stream: Stream, destination: str) -> Coroutine[None, None, None] | None:
    """Return the service for a destination such as "shell,v2,raw:command"; terminals are not supported."""
    name, _, argument = destination.partition(":")
    kind, *flags = name.split(",")
    if kind == "sync":
        return serve_files(stream)
    if kind in {"shell", "exec"}:
        return run_shell(stream, argument, packets="v2" in flags)
    return None
