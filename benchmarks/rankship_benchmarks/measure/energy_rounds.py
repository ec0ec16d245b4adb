"""Metered rounds: every artifact between two rests, in separate trials after the timed ones.

A meter that the agent reads loads the device a little, equally at rest and at work, so no latency is taken from here.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rankship_benchmarks.bundle.bundle import append_metered, open_bundle
from rankship_benchmarks.bundle.suite import EnergyChoice
from rankship_benchmarks.judge.validity import FEWEST_SAMPLES
from rankship_benchmarks.measure.pending import Pending, forget_pending, note_pending
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import ConnectionLost
from rankship_pipeline.foundation.records import Artifact
from rankship_targets.client.detached import Ticket, make_ticket
from rankship_targets.session.agent_requests import LONGEST_COOLING_S
from rankship_targets.session.metered import measure_metered, require_meter
from rankship_targets.session.session import Session
from rankship_targets.trials.request import MeasureRequest
from rankship_targets.trials.trial import MeteredTrial

REPEATS = 1  # of a trial whose recording broke off because the connection was lost


def measure_energy(
    folder: Path,
    planned: Sequence[tuple[int, Artifact]],
    make_request: Callable[[int, Artifact], MeasureRequest],
    choice: EnergyChoice,
    session: Session,
    steps: Steps,
) -> None:
    """Take every planned trial that is missing in the bundle; call it inside `writing(folder)`.

    A trial that a killed host left running is ended: its recording is lost.
    """
    forget_pending(folder, session)
    done = {(one.trial.round, one.trial.key) for one in open_bundle(folder).metered}
    wanted = [(number, artifact) for number, artifact in planned if (number, artifact.key) not in done]
    with steps.track(f"meter on {session.device.name}", len(wanted)) as advance:
        for number, artifact in wanted:
            advance(f"round {number + 1}/{choice.rounds}: {artifact.key.title}")
            request = stretch(make_request(number, artifact), choice)
            append_metered(folder, _take(folder, request, session))
            forget_pending(folder, session)


def stretch(request: MeasureRequest, choice: EnergyChoice) -> MeasureRequest:
    """Return the request with a timed loop that is long enough for a meter, between two rests."""
    extra_s = (choice.busy_ms + 2 * choice.idle_ms) / 1000
    return replace(
        request,
        min_samples=FEWEST_SAMPLES,
        min_duration_ms=choice.busy_ms,
        idle_ms=choice.idle_ms,
        timeout_s=request.timeout_s + extra_s,
    )


def watch(request: MeasureRequest, session: Session, ticket: Ticket) -> MeteredTrial:
    """Take one trial while the device's meter records, for at most the trial's time limit."""
    meter = session.open_meter(require_meter(session.device), round(1000 * (request.timeout_s + LONGEST_COOLING_S)))
    return measure_metered(session, request, meter, ticket)


def _take(folder: Path, request: MeasureRequest, session: Session) -> MeteredTrial:
    """Take one trial; take it again if the recording broke off."""
    for attempt in range(REPEATS + 1):
        pending = Pending(round=request.round, key=request.key, ticket=make_ticket())
        note_pending(folder, pending)
        try:
            return watch(request, session, pending.ticket)
        except ConnectionLost:
            if attempt == REPEATS:
                raise
            forget_pending(folder, session)
    raise AssertionError("the last attempt returns or raises")
