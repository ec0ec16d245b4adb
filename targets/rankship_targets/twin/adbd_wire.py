"""adb's wire protocol: packets between a computer and a phone, and the streams that share one connection."""

import asyncio
import struct
from collections.abc import AsyncIterator

VERSION = 0x01000001  # the first version without checksums
MAX_BYTES = 1 << 20
_HEADER = struct.Struct("<6I")
_CHECKED = {"CNXN", "AUTH"}  # sent before the versions are agreed


class Wire:
    """Packets in and out over one TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.max_bytes = 4096
        self._version = VERSION
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()

    def agree(self, version: int, max_bytes: int) -> None:
        """Adopt the version and packet size that both sides support."""
        self._version = min(version, VERSION)
        self.max_bytes = min(max_bytes, MAX_BYTES)

    async def send(self, command: str, first: int, second: int, content: bytes = b"") -> None:
        """Send one packet."""
        number = int.from_bytes(command.encode(), "little")
        checked = self._version < VERSION or command in _CHECKED
        checksum = sum(content) & 0xFFFFFFFF if checked else 0
        header = _HEADER.pack(number, first, second, len(content), checksum, number ^ 0xFFFFFFFF)
        async with self._turn:
            self._writer.write(header + content)
            await self._writer.drain()

    async def packets(self) -> AsyncIterator[tuple[str, int, int, bytes]]:
        """Yield packets until the other side is gone."""
        while True:
            try:
                header = await self._reader.readexactly(_HEADER.size)
                number, first, second, size, _, magic = _HEADER.unpack(header)
                if magic != number ^ 0xFFFFFFFF or size > MAX_BYTES:
                    return
                content = await self._reader.readexactly(size)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            yield number.to_bytes(4, "little").decode("latin-1"), first, second, content

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


class Stream:
    """One of a connection's streams; sending a packet waits until the other side has confirmed it."""

    def __init__(self, wire: Wire, local: int, remote: int) -> None:
        self.local = local
        self.remote = remote
        self.closed = False
        self._wire = wire
        self._arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self._taken = asyncio.Event()
        self._rest = b""

    async def write(self, content: bytes) -> None:
        """Send bytes; ConnectionResetError once the other side has closed."""
        for start in range(0, len(content), self._wire.max_bytes):
            if self.closed:
                raise ConnectionResetError
            self._taken.clear()
            part = content[start : start + self._wire.max_bytes]
            await self._wire.send("WRTE", self.local, self.remote, part)
            await self._taken.wait()

    async def read(self) -> bytes:
        """Return the next packet's content; empty once the other side has closed."""
        content = await self._arrived.get()
        if content:
            await self._wire.send("OKAY", self.local, self.remote)
        return content

    async def read_exactly(self, size: int) -> bytes:
        """Return `size` bytes; EOFError if the other side closes before."""
        while len(self._rest) < size:
            content = await self.read()
            if not content:
                raise EOFError
            self._rest += content
        head, self._rest = self._rest[:size], self._rest[size:]
        return head

    def arrive(self, content: bytes) -> None:
        """Queue the content of a packet that arrived."""
        self._arrived.put_nowait(content)

    def confirm(self) -> None:
        """Note that the other side confirmed the last packet."""
        self._taken.set()

    def abort(self) -> None:
        """Note that the other side has closed."""
        self.closed = True
        self._taken.set()
        self._arrived.put_nowait(b"")

    async def close(self) -> None:
        """Close the stream, unless the other side has closed it."""
        if not self.closed:
            self.abort()
            await self._wire.send("CLSE", self.local, self.remote)
