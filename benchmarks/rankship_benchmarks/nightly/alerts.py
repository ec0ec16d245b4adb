"""Tells people and programs about a night: a JSON file, and messages through Apprise (webhooks, e-mail, chats).

The addresses hold passwords. They come from the environment or from a file, and are never written anywhere: not in the
night's record, not in a message of ours, and logs are closed while Apprise works.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_benchmarks.judge.changes import Explanation
from rankship_benchmarks.nightly.page import list_alarms, list_gaps, state_headline
from rankship_benchmarks.nightly.records import NightRecord
from rankship_benchmarks.nightly.repository import Commit
from rankship_benchmarks.stats.estimates import Estimate
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record

if TYPE_CHECKING:
    from apprise import Apprise

URLS, URLS_FILE = "RANKSHIP_ALERT_URLS", "RANKSHIP_ALERT_URLS_FILE"
_HINT = "one address a line, for example json://host/path or mailtos://user:password@host"


@record
class WorseCase:
    """One case that is worse: in time or energy, its ratio to the earlier night, and what differs."""

    device: str
    case: ArtifactKey
    figure: str
    reason: str
    ratio: Estimate | None
    step: str | None
    why: Explanation | None


@record
class NightSummary:
    """A night for other programs; `gaps` says what has no number and why, `exit_code` is the command's status."""

    night: int
    suite: str
    recipe: str
    started_utc: str
    exit_code: int
    headline: str
    worse: tuple[WorseCase, ...]
    gaps: tuple[str, ...]
    commit: Commit | None


def summarise_night(night: NightRecord) -> NightSummary:
    """Sum up a finished night."""
    worse = [
        WorseCase(
            device=one.shown,
            case=case.key,
            figure=figure,
            reason=case.reason,
            ratio=case.ratio,
            step=case.step,
            why=case.why,
        )
        for one in night.devices
        for figure, cases in (("time", one.cases), ("energy", one.energies))
        for case in cases
        if case.verdict == "worse"
    ]
    return NightSummary(
        night=night.number,
        suite=night.suite,
        recipe=night.recipe,
        started_utc=night.started_utc,
        exit_code=night.exit_code or 0,
        headline=night.failure or state_headline(night),
        worse=tuple(worse),
        gaps=tuple(list_gaps(night)),
        commit=night.commit,
    )


def write_message(night: NightRecord) -> tuple[str, str]:
    """Write a message about a night: its title and its text."""
    lines = [night.failure or state_headline(night)]
    for alarm in list_alarms(night):
        lines += [f"▲ {alarm.text}", *(f"    {reason}" for reason in alarm.reasons)]
    return f"Rankship, night {night.number} of {night.suite}: exit {night.exit_code}", "\n".join(
        [*lines, *(f"! {gap}" for gap in list_gaps(night))]
    )


def read_addresses(environment: Mapping[str, str] = os.environ) -> "Apprise | None":
    """Read the addresses for messages from the environment, or the file that it names; None if there are none.

    InputError if Apprise is not installed, the file cannot be read, or an address is none; it names only its place.
    """
    texts = [environment.get(URLS, "")]
    if path := environment.get(URLS_FILE):
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as failure:
            message = f"{URLS_FILE} names {path}, which cannot be read: {type(failure).__name__}"
            raise InputError(message, hint=_HINT) from None
    lines = [line.strip() for text in texts for line in text.splitlines()]
    addresses = [line for line in lines if line and not line.startswith("#")]
    return _open(addresses) if addresses else None


def _open(addresses: Sequence[str]) -> "Apprise":
    try:
        import apprise
    except ModuleNotFoundError:
        raise InputError(
            "addresses for alerts are given, but Apprise is not installed", hint="pip install 'rankship[alerts]'"
        ) from None
    with _keeping_quiet():
        found = apprise.Apprise()
        for place, address in enumerate(addresses, start=1):
            if not found.add(address):
                message = f"alert address {place} of {len(addresses)} is none that Apprise knows"
                raise InputError(message, hint=_HINT)
    return found


def send_message(addresses: "Apprise", title: str, text: str) -> bool:
    """Send a message to every address; returns whether all of them took it."""
    with _keeping_quiet():
        return bool(addresses.notify(title=title, body=text, body_format="text"))


@contextmanager
def _keeping_quiet() -> Iterator[None]:
    """Close every log of this process: Apprise and the libraries that it sends by name addresses in theirs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
