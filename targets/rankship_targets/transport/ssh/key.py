"""The host key that the inventory pins, the refusal of any other key, and the user's private key."""

import base64
from pathlib import Path

import paramiko
from paramiko.pkey import UnknownKeyType

from rankship_pipeline.foundation.errors import AuthError, HostKeyChanged, InputError

SSH_PORT = 22


class PinnedKey(paramiko.MissingHostKeyPolicy):
    """One device's expected public key; as paramiko's policy for missing keys, it refuses keys of other types."""

    def __init__(self, where: str, text: str) -> None:
        self._where = where
        try:
            kind, blob = text.split()[:2]
            self.key = paramiko.PKey.from_type_string(kind, base64.b64decode(blob, validate=True))
        except (ValueError, paramiko.SSHException, UnknownKeyType) as failure:
            hint = "copy type and key from the board's /etc/ssh/ssh_host_ed25519_key.pub"
            raise InputError(f"{where}: host_key is not a public key: {failure}", hint=hint) from None

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:  # noqa: ARG002
        """Refuse a key of another type than the pinned one."""
        raise refuse_key(self._where, self.key, key)


def refuse_key(where: str, pinned: paramiko.PKey, shown: paramiko.PKey) -> HostKeyChanged:
    """Return the error that shows both fingerprints."""
    message = f"{where} shows host key {_show(shown)}, the inventory pins {_show(pinned)}"
    hint = (
        "if the board was reinstalled, compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` at its own "
        "console and correct host_key; otherwise something else answers at this address"
    )
    return HostKeyChanged(message, hint=hint)


def read_private_key(where: str, path: Path) -> paramiko.PKey:
    """Read the user's private key; its content never appears in a message."""
    path = path.expanduser()
    try:
        return paramiko.PKey.from_path(path)
    except OSError as failure:
        message = f"{where}: no key file {path}: {failure.strerror}"
        raise InputError(message, hint="correct key_file in the inventory") from None
    except (paramiko.PasswordRequiredException, TypeError):  # TypeError: the same from the cryptography library
        hint = f"run `ssh-add {path}` and remove key_file from the inventory, so that the SSH agent is used"
        raise AuthError(f"{where}: the key file {path} needs a passphrase", hint=hint) from None
    except (ValueError, UnknownKeyType, paramiko.SSHException):
        message = f"{where}: {path} is not a readable private key"
        raise InputError(message, hint="name the private key, not the .pub file beside it") from None


def name_host(host: str, port: int) -> str:
    """Return an address as SSH writes it in known_hosts."""
    return host if port == SSH_PORT else f"[{host}]:{port}"


def _show(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.fingerprint}"
