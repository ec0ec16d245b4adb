"""Trials that a meter watches, from the rest before to the rest after; and whether there is such a meter."""

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
    """Record while a pushed artifact is timed between two rests; the trial stays on the device until it is forgotten.

    What becomes of the meter or of the way to it is raised when the trial is over.
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
    """Find the meter that the inventory names for a device."""
    if device.meter is None:
        hint = f'add [{device.name}.meter] with name = "…" to the inventory (docs/energy.md), or take [energy] out'
        raise InputError(f"the suite asks for energy, and {device.name} has no meter", hint=hint)
    return device.meter


def check_meter(session: Session) -> Offer | None:
    """See that the device's meter can be read now and has the rails that are wanted; gives what it offers.

    None where it leaves a file, which is looked at when it is read.
    """
    device, choice = session.device, require_meter(session.device)
    if choice.file is not None:
        return None
    offer = session.open_meter(choice, limit_ms=1).probe()
    if offer.problem:
        message = f"{device.name}: meter {choice.name}: {offer.problem}"
        raise Lacks(message, hint="choose another meter, or mend what the message says")
    known = tuple(channel.name for channel in offer.channels)
    _refuse_rails(choice.rails, known, f"{device.name}: meter {choice.name}")
    return offer


def _refuse_rails(wanted: tuple[str, ...], known: tuple[str, ...], where: str) -> None:
    """Raise InputError where it is not clear which rails are meant; () means the only one."""
    missing = [name for name in wanted if name not in known]
    if missing or (not wanted and len(known) != 1):
        message = f"{where} has no rail {missing[0]!r}" if missing else f"{where} has {len(known)} rails"
        raise InputError(message, hint=f"name those to add up as `rails`, of: {', '.join(known)}")
