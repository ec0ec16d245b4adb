"""A check before any long work: whether devices answer, accept the login, and can run what will be pushed."""

from collections.abc import Iterable, Sequence

from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import Lacks
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_targets.devices.device import Device
from rankship_targets.devices.installing import show_kit, show_pip_install
from rankship_targets.devices.quarantine import watching
from rankship_targets.session.metered import check_meter
from rankship_targets.session.session import open_session


def check_ready(
    devices: Iterable[Device], formats: Sequence[Format], steps: Steps, *, with_energy: bool = False
) -> None:
    """Open a session on each device and probe it; Lacks names every missing runtime, or the meter."""
    for device in devices:
        with steps.step(f"check that {device.name} is ready"), watching(device), open_session(device) as session:
            probe = session.probe()
            if with_energy:
                check_meter(session)
        kit = show_kit(device.name)
        missing = [name for name in formats if probe.runtimes.get(name) is None]
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
