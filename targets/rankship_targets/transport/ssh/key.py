"""The host key that the inventory pins, the refusal of any other key, and the user's private key."""

import base64
from contextlib import suppress
from pathlib import Path

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from paramiko.pkey import UnknownKeyType

from rankship_pipeline.foundation.commands import show_command
from rankship_pipeline.foundation.errors import AuthError, HostKeyChanged, InputError


class PinnedKey:
    """One device's expected public key."""

    def __init__(self, where: str, text: str) -> None:
        self._where = where
        try:
            kind, blob = text.split()[:2]
            self.key = paramiko.PKey.from_type_string(kind, base64.b64decode(blob, validate=True))
        except (ValueError, paramiko.SSHException, UnknownKeyType) as failure:
            hint = "copy type and key from the board's /etc/ssh/ssh_host_ed25519_key.pub"
            raise InputError(f"{where}: host_key is not a public key: {failure}", hint=hint) from None

    def prefer(self, link: paramiko.Transport) -> None:
        """Ask a server for its key of the pinned type first."""
        options = link.get_security_options()
        kind = self.key.get_name()
        wanted = {"ssh-rsa", "rsa-sha2-256", "rsa-sha2-512"} if kind == "ssh-rsa" else {kind}
        options.key_types = sorted(options.key_types, key=lambda one: one not in wanted)

    def check(self, shown: paramiko.PKey) -> None:
        """Raise HostKeyChanged unless a server shows the pinned key."""
        if (shown.get_name(), shown.asbytes()) != (self.key.get_name(), self.key.asbytes()):
            raise refuse_key(self._where, self.key, shown)


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
        hint = f"run {show_command('ssh-add', str(path))}: the SSH agent is used then"
        raise AuthError(f"{where}: the key file {path} needs a passphrase", hint=hint) from None
    except (ValueError, UnknownKeyType, paramiko.SSHException, UnsupportedAlgorithm):
        raise _explain_unreadable(where, path) from None


def _explain_unreadable(where: str, path: Path) -> AuthError | InputError:
    """Return the error for a file that holds no key for this program: a security key's, or none at all."""
    public = path.with_name(f"{path.name}.pub")
    held = b""
    with suppress(OSError):
        held = path.read_bytes() + (public.read_bytes() if public.is_file() else b"")
    if b"sk-ssh-" in held or b"sk-ecdsa-" in held or _names_security_key(held):
        hint = f"run {show_command('ssh-add', str(path))} and touch it when it blinks: only the SSH agent can use it"
        return AuthError(f"{where}: the key of {path} is on a security key (FIDO)", hint=hint)
    message = f"{where}: {path} is not a readable private key"
    return InputError(message, hint="name the private key in OpenSSH's form, not the .pub file beside it")


def _names_security_key(pem: bytes) -> bool:
    """Return whether a private key file in OpenSSH's form holds a key's handle on a security key."""
    lines = [line for line in pem.splitlines() if line and not line.startswith(b"-") and b" " not in line]
    with suppress(ValueError):
        inside = base64.b64decode(b"".join(lines), validate=True)
        return b"sk-ssh-" in inside or b"sk-ecdsa-" in inside
    return False


def _show(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.fingerprint}"
