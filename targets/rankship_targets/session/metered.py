"""Trials with a power trace, from the rest before to the rest after; and the check that the device has a meter."""

from contextlib import suppress

from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import InputError, Lacks, RankshipError
from rankship_targets.client.detached import Ticket
from rankship_targets.devices.device import Device
from rankship_targets.devices.meter_choice import MeterChoice
from rankship_targets.meters.meter import Meter
from rankship_targets.session.session import Session
from rankship_targets.trials.request import MeasureRequest
from rankship_targets.trials.trace import Offer
from rankship_targets.trials.trial import MeteredTrial


def measure_metered(session: Session, request: MeasureRequest, meter: Meter, ticket: Ticket) -> MeteredTrial:
    """Record power while a pushed artifact is timed between two rests; the trial stays on the device until `forget`.

    A fault of the meter or its connection is raised when the trial is over.
    """
    meter.start()
    try:
        trial = session.measure(request, ticket)
    except BaseException:
        with suppress(RankshipError, OSError):  # raises why the trial ended, not how that affected the trace
            meter.stop()
        raise
    trace = meter.stop()
    return MeteredTrial(trial=trial, trace=trace, trace_sha256=digest(trace))


def require_meter(device: Device) -> MeterChoice:
    """Return the meter that the inventory names for a device; InputError if it names none."""
    if device.meter is None:
        hint = f'add [{device.name}.meter] with name = "…" to the inventory (docs/energy.md), or remove [energy]'
        raise InputError(f"the suite measures energy, but {device.name} has no meter", hint=hint)
    return device.meter


def check_meter(session: Session) -> Offer | None:
    """Check that the device's meter can be read now and has the rails of the inventory; returns what it offers.

    None for a meter that writes a file, which is checked when it is read.
    """
    device, choice = session.device, require_meter(session.device)
    if choice.file is not None:
        return None
    offer = session.open_meter(choice, limit_ms=1).probe()
    if offer.problem:
        message = f"{device.name}: meter {choice.name}: {offer.problem}"
        raise Lacks(message, hint="choose another meter, or fix what the message names")
    known = tuple(channel.name for channel in offer.channels)
    told = f" ({'; '.join(offer.notes)})" if offer.notes else ""
    _refuse_rails(choice.rails, known, f"{device.name}: meter {choice.name}{told}")
    return offer


def _refuse_rails(wanted: tuple[str, ...], known: tuple[str, ...], where: str) -> None:
    """Raise InputError unless every wanted rail is known; () means the meter's only rail."""
    missing = [name for name in wanted if name not in known]
    if missing or (not wanted and len(known) != 1):
        message = f"{where} has no rail {missing[0]!r}" if missing else f"{where} has {len(known)} rails"
        raise InputError(message, hint=f"list the rails to add up as `rails`; the meter has {', '.join(known)}")
