"""Finds the devices that `--on` names: in this machine's inventory, or with `--scheduler` on the hosts of a rack."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.fleet.measure import Here, Lab
from rankship_benchmarks.fleet.schedule import Job, list_devices
from rankship_pipeline.foundation.errors import InputError
from rankship_targets.devices.device import find_device


def refuse_exam(suite: Suite, scheduler: str | None) -> None:
    """Raise InputError for a suite that scores devices of a rack: what scores them is code, which does not travel."""
    if suite.accuracy is not None and scheduler is not None:
        message = "the suite's [accuracy] is not measured over a scheduler"
        raise InputError(message, hint="leave it out, or measure on the host that holds the device")


@contextmanager
def open_lab(jobs: Sequence[Job], arguments: argparse.Namespace) -> Iterator[Lab]:
    """Yield who holds the jobs' devices; InputError for a device that the inventory lacks, or a rack out of reach."""
    if arguments.scheduler is None:
        yield Here({name: find_device(name, arguments.inventory) for name in list_devices(jobs)})
        return
    if arguments.inventory is not None:
        hint = "leave --inventory out: each host of a rack has its own"
        raise InputError("--inventory and --scheduler exclude each other", hint=hint)

    from rankship_benchmarks.rack.home import open_rack
    from rankship_benchmarks.rack.keys import find_way

    with open_rack(find_way(arguments.scheduler, arguments.keys)) as rack:
        yield rack
