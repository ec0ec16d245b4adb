"""Quarantine: a device that failed three times in a row is not used until `rankship doctor` clears it.

The failures of each device are kept in a small file in the user's state folder. Two processes that record a failure
at the same moment may count it once; the quarantine then begins one failure later.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.commands import show_command
from rankship_pipeline.foundation.errors import InputError, Lacks, ManifestRefused, Quarantined, TargetBusy, TargetError
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_targets.devices.device import Device, user_folder

LIMIT = 3
# Not failures of the device: another run holds it, something is not installed, files on this host are wrong.
_NOT_ITS_OWN = (TargetBusy, Lacks, ManifestRefused, Quarantined)


@record
class Trouble:
    """One failure of a device: when, which error, and its message."""

    time_utc: str
    error: str
    message: str


@record
class Troubles:
    """A device's failures since its last success, oldest first."""

    device: str
    failures: tuple[Trouble, ...]


@contextmanager
def watching(device: Device) -> Iterator[None]:
    """Refuse a device in quarantine; record a failure of the block, or clear all failures after its success.

    An error that is not the device's own, or an interruption, changes nothing.
    """
    refuse_quarantined(device)
    try:
        yield
    except _NOT_ITS_OWN:
        raise
    except TargetError as failure:
        _note(device, failure)
        raise
    clear(device)


def refuse_quarantined(device: Device) -> None:
    """Raise Quarantined, listing the failures, if the device failed too often in a row."""
    troubles = read_troubles(device)
    if troubles is not None and len(troubles.failures) >= LIMIT:
        message = f"{device.name} is in quarantine: {describe(troubles)}"
        doctor = show_command("rankship", "doctor", device.name)
        raise Quarantined(message, hint=f"run {doctor}: it ends the quarantine if it succeeds")


def describe(troubles: Troubles) -> str:
    """Return the number of failures and each of them, as text."""
    shown = "; ".join(f"{one.time_utc} {one.error}: {one.message}" for one in troubles.failures)
    times = "once" if len(troubles.failures) == 1 else f"{len(troubles.failures)} times in a row"
    return f"it failed {times}: {shown}"


def read_troubles(device: Device) -> Troubles | None:
    """Read a device's failures; None if there are none, or the file is damaged."""
    path = _locate(device)
    with suppress(FileNotFoundError, InputError):
        return decode(Troubles, path.read_bytes(), where=str(path))
    return None


def clear(device: Device) -> None:
    """Delete the record of failures."""
    _locate(device).unlink(missing_ok=True)


def _note(device: Device, failure: TargetError) -> None:
    before = read_troubles(device)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    trouble = Trouble(time_utc=now, error=type(failure).__name__, message=str(failure))
    kept = (*(before.failures if before else ()), trouble)[-LIMIT:]
    with suppress(OSError):  # a full disk here must not hide the device's own error
        write_atomic(_locate(device), encode(Troubles(device=device.name, failures=kept)).encode(), mode=0o600)


def _locate(device: Device) -> Path:
    """Return the record's path, named after the device and its address: a corrected entry begins without failures."""
    who = [device.name, device.transport, device.host, device.port, device.serial, device.twin]
    return user_folder("XDG_STATE_HOME", ".local/state") / "rankship" / "troubles" / f"{digest(who)[:32]}.json"
