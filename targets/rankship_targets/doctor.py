"""What a device's answers say about the numbers it would give."""

from collections.abc import Iterator
from typing import Literal

from rankship_pipeline.records import FORMATS, record
from rankship_pipeline.units import show_bytes, show_celsius
from rankship_targets.client import install_command
from rankship_targets.device import Device
from rankship_targets.events import Probe

WARM_MC, HOT_MC = 65_000, 80_000  # a Pi 4 slows down at 80 °C
BUSY_SHARE_MILLI = 250  # one-minute load per core above which another program shares the cores
LITTLE_DISK_BYTES, NO_DISK_BYTES = 1_000_000_000, 100_000_000


@record
class Check:
    """One finding; `advice` says what to do and is empty where all is well."""

    name: str
    verdict: Literal["ok", "warn", "fail"]
    finding: str
    advice: str = ""


def examine(device: Device, probe: Probe) -> list[Check]:
    """Judge everything that the probe told."""
    return [
        Check(name="python", verdict="ok", finding=f"{probe.python} on {probe.machine}, kernel {probe.kernel}"),
        *_examine_runtimes(device, probe),
        _examine_governor(probe.state.governor),
        _examine_temperature(probe.state.temperature_mc),
        _examine_load(probe.state.load_1m_milli, probe.cpu_count),
        _examine_disk(probe.free_bytes, device.workdir),
        _examine_psutil(device, probe.psutil),
    ]


def _examine_runtimes(device: Device, probe: Probe) -> Iterator[Check]:
    """Judge what is installed: a missing runtime closes one format, without any nothing can be measured."""
    any_found = any(probe.runtimes.values())
    for known in FORMATS:
        found = probe.runtimes.get(known)
        if found:
            yield Check(name=known, verdict="ok", finding=" ".join(found))
        else:
            advice = f"on the device: {install_command(device, known)}"
            yield Check(name=known, verdict="warn" if any_found else "fail", finding="no runtime", advice=advice)
    if probe.numpy is None:
        advice = f"on the device: {device.python} -m pip install numpy"
        yield Check(name="numpy", verdict="fail", finding="not installed", advice=advice)


def _examine_governor(governor: str | None) -> Check:
    if governor is None:
        advice = "fine for a virtual machine; its latencies are only comparable with themselves"
        return Check(name="governor", verdict="warn", finding="the device does not tell", advice=advice)
    if governor == "performance":
        return Check(name="governor", verdict="ok", finding=governor)
    advice = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    return Check(
        name="governor", verdict="warn", finding=f"{governor}: frequencies move while measuring", advice=advice
    )


def _examine_temperature(temperature_mc: int | None) -> Check:
    if temperature_mc is None:
        advice = "throttling will not be seen: watch for drift inside the runs"
        return Check(name="temperature", verdict="warn", finding="the device does not tell", advice=advice)
    finding = show_celsius(temperature_mc)
    if temperature_mc < WARM_MC:
        return Check(name="temperature", verdict="ok", finding=finding)
    verdict: Literal["warn", "fail"] = "fail" if temperature_mc >= HOT_MC else "warn"
    return Check(
        name="temperature", verdict=verdict, finding=finding, advice="let it cool, or give it a heat sink and a fan"
    )


def _examine_load(load_1m_milli: int | None, cpu_count: int) -> Check:
    if load_1m_milli is None:
        return Check(name="load", verdict="ok", finding="the device does not tell")
    finding = f"{load_1m_milli / 1000:.2f} over the last minute on {cpu_count} cores"
    if load_1m_milli <= BUSY_SHARE_MILLI * cpu_count:
        return Check(name="load", verdict="ok", finding=finding)
    return Check(
        name="load", verdict="warn", finding=finding, advice="see with `top` on the device what runs, and stop it"
    )


def _examine_disk(free_bytes: int, workdir: str) -> Check:
    finding = f"{show_bytes(free_bytes)} free for {workdir}"
    if free_bytes >= LITTLE_DISK_BYTES:
        return Check(name="disk", verdict="ok", finding=finding)
    verdict: Literal["warn", "fail"] = "fail" if free_bytes < NO_DISK_BYTES else "warn"
    return Check(
        name="disk", verdict=verdict, finding=finding, advice=f"delete old files below {workdir} on the device"
    )


def _examine_psutil(device: Device, version: str | None) -> Check:
    if version:
        return Check(name="psutil", verdict="ok", finding=version)
    advice = f"only where /sys does not tell frequency or temperature: {device.python} -m pip install psutil"
    return Check(name="psutil", verdict="warn", finding="not installed", advice=advice)
