"""The lease: a folder on the device that says who measures there. `mkdir` is atomic, so only one host gets it.

The folder holds one file, named after its owner's token. To take over from a dead owner is to remove this file: only
one of several hosts succeeds, and none can remove a newer owner's file by mistake. One command makes folder and file,
so that a broken connection leaves both or none.
"""

import os
import secrets
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError, TargetBusy
from rankship_pipeline.foundation.frozen import record
from rankship_targets.devices.device import Device
from rankship_targets.transport.protocol import STEP_TIMEOUT_S, Transport, explain_failure, read_numbers, run_checked

STALE_S = 30 * 60
HELD = 17  # the script's exit status when somebody holds the lease
# `env printf`, because the built-in one does not say why it cannot write. A lease without a file would lock out all.
NAME = 'env printf %s "$2" > "$3" && exit; rm -f -- "$3"; rmdir -- "$1"; exit 1'
TAKE = f'mkdir -- "$1" || {{ [ -d "$1" ] && exit {HELD}; exit 1; }}; {NAME}'


@record
class Owner:
    """Who holds a device; `namespace` distinguishes containers that share a host name."""

    token: str
    host: str
    namespace: str
    pid: int
    since_utc: str


def describe_owner() -> Owner:
    """Describe this process as an owner, with a new token."""
    return Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        namespace=_namespace(),
        pid=os.getpid(),
        since_utc=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@record
class Lease:
    """The right to measure on a device; a lease that was not renewed for `stale_s` can be taken over."""

    device: Device
    folder: str
    owner: Owner
    stale_s: int = STALE_S

    def take(self, transport: Transport) -> None:
        """Take the device, also from an owner that died or stopped renewing; TargetBusy if another owner holds it."""
        if not self._make(transport, TAKE):
            token = _read_token(transport, self.folder)
            if token != self.owner.token:
                owner = _read_owner(transport, self.folder, token)
                dead = _died_here(owner) or _age_s(transport, self.folder) >= self.stale_s
                if not dead or not self._remove(transport, token) or not self._make(transport, NAME):
                    raise self._busy(owner)
        _held.add(self.owner.token)

    def renew(self, transport: Transport) -> None:
        """Renew the lease; TargetBusy if somebody else has taken the device."""
        token = _read_token(transport, self.folder)
        if token != self.owner.token:
            raise self._busy(_read_owner(transport, self.folder, token))
        run_checked(transport, ["touch", "--", self.folder])

    def release(self, transport: Transport) -> None:
        """Release the device, unless another owner has taken it."""
        self.give_up()
        if _succeeds(transport, "rm", "--", self._note(self.owner.token)):
            _succeeds(transport, "rmdir", "--", self.folder)

    def give_up(self) -> None:
        """Forget the lease in this process only: the next run of this host takes an unreachable device's lease over."""
        _held.discard(self.owner.token)

    def _make(self, transport: Transport, script: str) -> bool:
        """Run a script that writes this owner's file; False if somebody holds the lease."""
        words = [self.folder, encode(self.owner), self._note(self.owner.token)]
        done = transport.run(["sh", "-c", script, "sh", *words], timeout_s=STEP_TIMEOUT_S)
        if done.code not in {0, HELD}:
            raise explain_failure([f"taking the lease {self.folder}"], done.code, done.stderr)
        return done.code == 0

    def _remove(self, transport: Transport, token: str | None) -> bool:
        if token is not None:
            return _succeeds(transport, "rm", "--", self._note(token))
        return _succeeds(transport, "rmdir", "--", self.folder) and _succeeds(transport, "mkdir", "--", self.folder)

    def _note(self, token: str) -> str:
        return f"{self.folder}/{token}.json"

    def _busy(self, owner: Owner | None) -> TargetBusy:
        who = f"{owner.host}, process {owner.pid}, since {owner.since_utc}" if owner else "an unknown owner"
        hint = f"wait for it to end; if nothing runs there any more, remove {self.folder} on the device"
        return TargetBusy(f"{self.device.name} is held by {who}", hint=hint)


def _succeeds(transport: Transport, *argv: str) -> bool:
    return transport.run(argv, timeout_s=STEP_TIMEOUT_S).code == 0


def _read_token(transport: Transport, folder: str) -> str | None:
    """Read the owner's token; None if there is none (yet)."""
    done = transport.run(["ls", "--", folder], timeout_s=STEP_TIMEOUT_S)
    names = [name.removesuffix(".json") for name in done.stdout.split() if name.endswith(".json")]
    return names[0] if len(names) == 1 else None


def _read_owner(transport: Transport, folder: str, token: str | None) -> Owner | None:
    """Read the owner's file; None if it is gone or incomplete."""
    done = transport.run(["cat", "--", f"{folder}/{token}.json"], timeout_s=STEP_TIMEOUT_S)
    with suppress(InputError):
        return decode(Owner, done.stdout, where=folder) if done.code == 0 else None
    return None


_held: set[str] = set()  # the tokens of this process's own leases, except those that it gave up


def _died_here(owner: Owner | None) -> bool:
    if owner is None or (owner.host, owner.namespace) != (socket.gethostname(), _namespace()):
        return False
    if owner.pid == os.getpid():
        return owner.token not in _held
    return not psutil.pid_exists(owner.pid)


def _age_s(transport: Transport, folder: str) -> int:
    """Return how long ago the lease was renewed, by the device's own clock; 0 if it has just gone."""
    done = transport.run(["stat", "-c", "%Y", "--", folder], timeout_s=STEP_TIMEOUT_S)
    if done.code != 0:
        return 0
    (renewed,) = read_numbers(done.stdout, 1, f"when {folder} was changed")
    (now,) = read_numbers(run_checked(transport, ["date", "+%s"]), 1, "the device's clock")
    return now - renewed


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
