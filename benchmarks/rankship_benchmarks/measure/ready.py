"""A check before any long work: whether devices answer, accept the login, and can run what will be pushed."""

from collections.abc import Collection, Iterable, Mapping

from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.delegates import DELEGATES
from rankship_pipeline.foundation.errors import Lacks
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_targets.devices.device import Device
from rankship_targets.devices.installing import show_kit, show_pip_install
from rankship_targets.devices.quarantine import watching
from rankship_targets.session.metered import check_meter
from rankship_targets.session.session import Session, open_session


def check_ready(
    devices: Iterable[Device], wanted: Mapping[Format, Collection[Delegate]], steps: Steps, *, with_energy: bool = False
) -> None:
    """Open a session on each device and probe it; Lacks names every missing runtime, the meter, or a delegate.

    `wanted` are the formats, and the delegates that their runtimes must have beside what each does by itself.
    """
    for device in devices:
        with steps.step(f"check that {device.name} is ready"), watching(device), open_session(device) as session:
            probe = session.probe()
            if with_energy:
                check_meter(session)
            for name, delegates in wanted.items():
                if delegates and probe.numpy is not None and probe.runtimes.get(name) is not None:
                    _check_delegates(session, name, delegates, " ".join(probe.runtimes[name] or ()))
        kit = show_kit(device.name)
        missing = [name for name in wanted if probe.runtimes.get(name) is None]
        if not missing and probe.numpy is None:
            install = show_pip_install(device, "numpy", managed=probe.managed)
            raise Lacks(f"{device.name} has no numpy", hint=f"{kit}; or on the device: {install}")
        if missing:
            install = "; ".join(
                show_pip_install(device, FACTS[name].pip_packages, managed=probe.managed) for name in missing
            )
            raise Lacks(
                f"{device.name} has no runtime for {', '.join(missing)}",
                hint=f"{kit}; or on the device: {install}; or leave the format out of the recipe",
            )


def _check_delegates(session: Session, artifact_format: Format, wanted: Collection[Delegate], runtime: str) -> None:
    """Raise Lacks for a delegate that a runtime lacks: it would compute on the processor, and say nothing."""
    facts = DELEGATES[artifact_format]
    programs = [one.delegate for one in facts if one.asked == "benchmark_model"]
    if any(one in programs for one in wanted):
        session.find_program()
    here = (*session.list_delegates(artifact_format), *programs)
    lacking = ", ".join(one.title for one in facts if one.delegate in wanted and one.delegate not in here)
    if lacking:
        known = ", ".join(one.title for one in facts if one.delegate in here)
        message = f"{session.device.name}'s {runtime} has no {lacking} for {artifact_format}, only {known}"
        hint = f"install a build that has it, or leave it out of the suite's delegates.{artifact_format}"
        raise Lacks(message, hint=hint)
