"""SSH keys of every kind for tests: an agent that holds some, and the files of a key on a security key."""

import base64
import contextlib
import os
import socketserver
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import paramiko

SECURITY_KEY = "sk-ssh-ed25519@openssh.com"
_LIST, _LISTED, _SIGN, _SIGNED, _FAILURE = 11, 12, 13, 14, 5


def encode_string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def make_security_blob(number: int = 7) -> bytes:
    """The public part of a key on a security key that nobody has."""
    return encode_string(SECURITY_KEY.encode()) + encode_string(bytes([number]) * 32) + encode_string(b"ssh:")


def write_security_key(path: Path, *, with_public: bool = True) -> bytes:
    """Write the files that `ssh-keygen -t ed25519-sk` leaves; returns the public part."""
    blob = make_security_blob()
    private = struct.pack(">II", 1, 1) + blob + b"\x01" + encode_string(b"handle" * 8) + encode_string(b"")
    private += encode_string(b"me@here")
    private += bytes(range(1, 1 + -len(private) % 8))
    none = encode_string(b"none")
    whole = b"openssh-key-v1\0" + none * 2 + encode_string(b"") + struct.pack(">I", 1)
    text = base64.encodebytes(whole + encode_string(blob) + encode_string(private)).decode()
    path.write_text(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{text}-----END OPENSSH PRIVATE KEY-----\n")
    path.chmod(0o600)
    if with_public:
        path.with_name(f"{path.name}.pub").write_text(f"{SECURITY_KEY} {base64.b64encode(blob).decode()} me@here\n")
    return blob


@contextlib.contextmanager
def holding_keys(socket: Path, keys: Sequence[paramiko.PKey | bytes]) -> Iterator[list[bytes]]:
    """Run an SSH agent that holds keys, and refuses to sign with those given as bytes; yields what it signed with."""
    asked: list[bytes] = []
    blobs = [key if isinstance(key, bytes) else key.asbytes() for key in keys]

    def answer(request: bytes) -> bytes:
        if request[0] == _LIST:
            listed = b"".join(encode_string(blob) + encode_string(b"held") for blob in blobs)
            return bytes([_LISTED]) + struct.pack(">I", len(blobs)) + listed
        message = paramiko.Message(request[1:])
        blob, data = message.get_binary(), message.get_binary()
        asked.append(blob)
        key = keys[blobs.index(blob)]
        if request[0] != _SIGN or isinstance(key, bytes):
            return bytes([_FAILURE])
        return bytes([_SIGNED]) + encode_string(key.sign_ssh_data(data).asbytes())

    class Agent(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while head := self.rfile.read(4):
                (length,) = struct.unpack(">I", head)
                self.wfile.write(encode_string(answer(self.rfile.read(length))))

    with socketserver.ThreadingUnixStreamServer(str(socket), Agent) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        before = os.environ.get("SSH_AUTH_SOCK")
        os.environ["SSH_AUTH_SOCK"] = str(socket)
        try:
            yield asked
        finally:
            server.shutdown()
            os.environ.pop("SSH_AUTH_SOCK")
            if before is not None:
                os.environ["SSH_AUTH_SOCK"] = before
