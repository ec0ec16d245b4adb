"""The host key an inventory pins, and the refusal of any other."""

import base64

import paramiko
from paramiko.pkey import UnknownKeyType

from rankship_pipeline.errors import HostKeyChanged, InputError

SSH_PORT = 22


class PinnedKey(paramiko.MissingHostKeyPolicy):
    """One device's expected public key; as the library's policy it refuses keys of every other type."""

    def __init__(self, where: str, text: str) -> None:
        self._where = where
        try:
            kind, blob = text.split()[:2]
            self.key = paramiko.PKey.from_type_string(kind, base64.b64decode(blob, validate=True))
        except (ValueError, paramiko.SSHException, UnknownKeyType) as failure:
            hint = "copy type and key from the board's /etc/ssh/ssh_host_ed25519_key.pub"
            raise InputError(f"{where}: host_key is no public key: {failure}", hint=hint) from None

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:  # noqa: ARG002
        """Refuse a key of another type than the pinned one."""
        raise refuse_key(self._where, self.key, key)


def refuse_key(where: str, pinned: paramiko.PKey, shown: paramiko.PKey) -> HostKeyChanged:
    """Make the error that shows both fingerprints."""
    message = f"{where} shows host key {_show(shown)}, the inventory pins {_show(pinned)}"
    hint = (
        "if the board was set up anew, compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` at its own "
        "console and correct host_key; otherwise something else answers at this address"
    )
    return HostKeyChanged(message, hint=hint)


def name_host(host: str, port: int) -> str:
    """Write an address the way SSH looks hosts up."""
    return host if port == SSH_PORT else f"[{host}]:{port}"


def _show(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.fingerprint}"
