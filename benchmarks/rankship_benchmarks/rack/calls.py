"""What a rack's Dask tasks do: each calls the host that holds the device, in the worker's own process.

An OSError here is one of the way to a host; a host's own becomes a TargetError.
"""

import logging
from collections.abc import Collection
from typing import Any

from rankship_benchmarks.rack.errand import Maker
from rankship_benchmarks.rack.host import Answer, Host
from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.formats import Format

HOSTS: dict[str, Host] = {}  # by the names of the devices that this process offers


CALLS = 16  # that a device's worker takes at once: one of the sender that is served, others of those that wait


def silence_dask() -> None:
    """Silence Dask's loggers, whose levels it sets as it is imported: both ends report what happens themselves."""
    import distributed  # noqa: F401 - see above

    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] == "distributed":
            logging.getLogger(name).setLevel(logging.CRITICAL)


def name_resource(device: str) -> str:
    """Name the resource of Dask that binds calls to the worker that offers a device."""
    return f"device {device}"


async def carry_out(device: str, ticket: str, text: str) -> Answer:
    """Do an errand."""
    with HOSTS[device].naming_itself():
        return await HOSTS[device].carry_out(device, ticket, text)


async def follow(device: str, ticket: str) -> Answer:
    """Follow an errand that was sent before."""
    with HOSTS[device].naming_itself():
        return await HOSTS[device].follow(device, ticket)


def check(device: str, maker: str, wanted: dict[Format, tuple[Delegate, ...]], with_energy: bool) -> None:  # noqa: FBT001 - it travels
    """Check that a device is ready."""
    sender = decode(Maker, maker, where="an errand's sender")
    with HOSTS[device].naming_itself():
        HOSTS[device].check(device, sender, wanted, with_energy=with_energy)


def list_missing(device: str, hashes: Collection[str]) -> tuple[str, ...]:
    """List the files that a host lacks."""
    return HOSTS[device].content.list_missing(hashes)


def add_part(device: str, sha256: str, sender: str, offset: int, data: bytes, size_bytes: int) -> None:
    """Add a part of a file to a host's content."""
    with HOSTS[device].naming_itself():
        HOSTS[device].content.add_part(sha256, sender, offset, data, size_bytes)


def forget(device: str, ticket: str) -> None:
    """Forget an errand whose bundle is home."""
    HOSTS[device].forget(ticket)


def is_offered(device: str, dask_scheduler: Any) -> bool:  # noqa: ANN401 - Dask passes its scheduler by this name
    """Tell, in the scheduler, whether any worker offers a device."""
    return bool(dask_scheduler.resources.get(name_resource(device)))


def list_offered(dask_scheduler: Any) -> list[str]:  # noqa: ANN401 - as above
    """List, in the scheduler, the devices that workers offer."""
    prefix = name_resource("")
    return sorted(
        name.removeprefix(prefix) for name, held in dask_scheduler.resources.items() if held and name.startswith(prefix)
    )


def read_allowed_failures(dask_scheduler: Any) -> int:  # noqa: ANN401 - as above
    """Read, in the scheduler, how often it repeats a task whose worker died."""
    return int(dask_scheduler.allowed_failures)
