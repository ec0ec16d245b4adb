"""Tickets: a note in the results folder of each errand that is out, so that the next command finds it if this one dies.

<results>/.errands/<hash of device and errand>.json   written before the errand leaves, deleted when its bundle is here
"""

import secrets
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record

_FOLDER = ".errands"


@record
class ErrandTicket:
    """An errand's name, by which its host knows it; `recipe` and `device` say what it measures where."""

    name: str
    recipe: str
    device: str


def take_ticket(results: Path, device: str, recipe: str, errand_sha256: str) -> ErrandTicket:
    """Return the ticket of an errand that is out already, else a new one, which is noted."""
    path = _locate(results, device, errand_sha256)
    found = _read(path)
    if found is None:
        found = ErrandTicket(name=secrets.token_hex(12), recipe=recipe, device=device)
        write_atomic(path, encode(found).encode())
    return found


def return_ticket(results: Path, device: str, errand_sha256: str) -> None:
    """Delete the note: the bundle is here."""
    _locate(results, device, errand_sha256).unlink(missing_ok=True)


def drop_tickets(results: Path, recipe: str, devices: Container[str]) -> None:
    """Delete the notes of a recipe's errands on these devices: their bundles will not be fetched any more."""
    for path in (results / _FOLDER).glob("*.json"):
        ticket = _read(path)
        if ticket is not None and ticket.recipe == recipe and ticket.device in devices:
            path.unlink(missing_ok=True)


def _read(path: Path) -> ErrandTicket | None:
    with suppress(FileNotFoundError, InputError):
        return decode(ErrandTicket, path.read_bytes(), where=str(path))
    return None


def _locate(results: Path, device: str, errand_sha256: str) -> Path:
    return results / _FOLDER / f"{digest([device, errand_sha256])[:32]}.json"
