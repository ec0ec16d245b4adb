"""A note of the trial that began last, kept in the bundle's folder so that its result is found if this process dies."""

from contextlib import suppress
from pathlib import Path

from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_targets.client.detached import Ticket
from rankship_targets.session.session import Session

_FILE = ".pending.json"


@record
class Pending:
    """A trial that is not in the bundle yet, and the ticket by which the device knows it."""

    round: int
    key: ArtifactKey
    ticket: Ticket

    @property
    def place(self) -> tuple[int, ArtifactKey]:
        """The trial's round and artifact."""
        return self.round, self.key


def note_pending(folder: Path, pending: Pending) -> None:
    """Write the note of a trial, before it begins."""
    write_atomic(folder / _FILE, encode(pending).encode())


def read_pending(folder: Path) -> Pending | None:
    """Read the note of the trial that began last; None if there is none, or an older release wrote it."""
    with suppress(FileNotFoundError, InputError):
        return decode(Pending, (folder / _FILE).read_bytes(), where=str(folder / _FILE))
    return None


def forget_pending(folder: Path, session: Session) -> None:
    """End the trial that the bundle's last writer left running, if any, and delete its note."""
    pending = read_pending(folder)
    if pending is not None:
        session.forget(pending.ticket)
        drop_pending(folder)


def drop_pending(folder: Path) -> None:
    """Delete the note: the trial is in the bundle and no longer on the device."""
    (folder / _FILE).unlink(missing_ok=True)
