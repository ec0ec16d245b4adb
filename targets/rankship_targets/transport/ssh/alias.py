"""The user's SSH configuration: what it says of a host, as OpenSSH itself evaluates it (`ssh -G`).

Without the `ssh` program, paramiko reads the file, which knows no Include.
"""

import getpass
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import paramiko

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record

_TIMEOUT_S = 20.0  # Match exec runs programs of the user
_DEFAULT_PORT = 22
# What Rankship cannot follow, and which value means that nothing is asked for.
_NOT_FOLLOWED = {"certificatefile": "", "identityagent": "SSH_AUTH_SOCK", "pkcs11provider": "none", "hostkeyalias": ""}


@record
class Alias:
    """What the configuration says of a host; `jump` is ProxyJump's text, `not_followed` names settings left out."""

    host: str
    port: int
    user: str
    key_files: tuple[str, ...]
    jump: str | None
    command: str | None
    not_followed: tuple[str, ...]


def read_alias(host: str) -> Alias | None:
    """Return what the user's configuration changes about a host; None if that is nothing."""
    path = Path.home() / ".ssh" / "config"
    program = shutil.which("ssh")
    if not program and not path.is_file():
        return None
    told = _ask_ssh(program, path, host) if program else _ask_paramiko(path, host)
    alias = _understand(host, told)
    plain = Alias(
        host=host, port=_DEFAULT_PORT, user=getpass.getuser(), key_files=(), jump=None, command=None, not_followed=()
    )
    return None if alias == plain else alias


def _ask_ssh(program: str, path: Path, host: str) -> dict[str, list[str]]:
    """Let OpenSSH evaluate its configuration; it looks below the account's home, not below $HOME."""
    own = Path(f"~{getpass.getuser()}/.ssh/config").expanduser()
    named = ["-F", str(path) if path.is_file() else "none"] if path != own else []
    try:
        done = subprocess.run(
            [program, "-G", *named, "--", host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"ssh did not read your configuration within {_TIMEOUT_S:g} s"
        raise InputError(message, hint=f"see what Match exec of {path} runs") from None
    if done.returncode != 0:
        message = f"ssh cannot read your configuration for {host!r}: {done.stderr.strip()[-300:]}"
        raise InputError(message, hint=f"correct {path}")
    told: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        told.setdefault(key.lower(), []).append(value)
    return told


def _ask_paramiko(path: Path, host: str) -> dict[str, list[str]]:
    try:
        told = paramiko.SSHConfig.from_path(str(path)).lookup(host)
    except (paramiko.SSHException, OSError, UnicodeDecodeError) as failure:
        raise InputError(
            f"cannot read {path}: {failure}", hint="install OpenSSH's client, which reads it all"
        ) from None
    return {key: value if isinstance(value, list) else [value] for key, value in told.items()}


def _understand(host: str, told: Mapping[str, list[str]]) -> Alias:
    def find(key: str) -> str | None:
        value = told.get(key, [""])[0]
        return None if value in {"", "none"} else value

    user, name, port = find("user") or getpass.getuser(), find("hostname") or host, find("port") or str(_DEFAULT_PORT)
    tokens = {
        "%%": "%",
        "%d": str(Path.home()),
        "%u": getpass.getuser(),
        "%h": name,
        "%r": user,
        "%n": host,
        "%p": port,
    }
    named = [_expand(file, tokens) for file in told.get("identityfile", [])]
    usual = str(Path.home() / ".ssh" / "id_")
    left = [key for key, nothing in _NOT_FOLLOWED.items() if find(key) not in {None, nothing}]
    return Alias(
        host=name,
        port=int(port),
        user=user,
        key_files=tuple(file for file in named if not file.startswith(usual)),
        jump=find("proxyjump"),
        command=find("proxycommand"),
        not_followed=tuple(left),
    )


def _expand(file: str, tokens: Mapping[str, str]) -> str:
    """Expand the tilde and OpenSSH's tokens in a path."""
    parts = file.split("%%")
    for token, value in tokens.items():
        parts = [part.replace(token, value) for part in parts]
    return str(Path("%".join(parts)).expanduser())
