"""The trial that was begun last, noted beside the others, so that its result is found should this process die."""

from contextlib import suppress
from pathlib import Path

from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.records import record
from rankship_targets.client.detached import Ticket
from rankship_targets.session.session import Session

_FILE = ".pending.json"


@record
class Pending:
    """A trial that is not in the bundle yet, and the name under which the device knows it."""

    round: int
    key: ArtifactKey
    ticket: Ticket

    @property
    def place(self) -> tuple[int, ArtifactKey]:
        """Which of a run's trials it is."""
        return self.round, self.key


def note_pending(folder: Path, pending: Pending) -> None:
    """Note a trial before it begins."""
    write_atomic(folder / _FILE, encode(pending).encode())


def read_pending(folder: Path) -> Pending | None:
    """Read which trial was begun last; None where none was, or an older release noted it."""
    with suppress(FileNotFoundError, InputError):
        return decode(Pending, (folder / _FILE).read_bytes(), where=str(folder / _FILE))
    return None


def forget_pending(folder: Path, session: Session) -> None:
    """End what a bundle's last writer left going on, if anything, and forget the note."""
    pending = read_pending(folder)
    if pending is not None:
        session.forget(pending.ticket)
        drop_pending(folder)


def drop_pending(folder: Path) -> None:
    """Forget the note: the trial is in the bundle and off the device."""
    (folder / _FILE).unlink(missing_ok=True)
