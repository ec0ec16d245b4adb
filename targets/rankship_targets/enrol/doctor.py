"""Checks what could spoil a device's numbers, from its answers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.delegates import DELEGATES
from rankship_pipeline.foundation.errors import TargetError
from rankship_pipeline.foundation.formats import FACTS, FORMATS, Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.units import show_bytes, show_celsius
from rankship_targets.devices.device import Device
from rankship_targets.devices.installing import show_kit_install, show_pip_install
from rankship_targets.trials.events import Probe

WARM_MC, HOT_MC = 65_000, 80_000  # a Pi 4 slows down at 80 °C
BUSY_SHARE_MILLI = 250  # one-minute load per core above which another program shares the cores
LITTLE_DISK_BYTES, NO_DISK_BYTES = 1_000_000_000, 100_000_000
SOME_SWAP_BYTES = 16_000_000  # an idle system may have swapped out this much long ago
LOW_BATTERY_PERCENT = 30  # below it, phones save power
CLOCK_OFFSET_NS = 1_000_000_000
# The bits of a Raspberry Pi's `vcgencmd get_throttled` for now; "since boot" is 16 bits higher.
THROTTLED_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "at the soft temperature limit"}
_SINCE_BOOT = 16
_SHOWN_DOUBTS = 6  # phones have dozens of zones
_NOT_REPORTED = "the device does not report it"
_MACHINES_64 = {"aarch64", "x86_64", "riscv64"}


@record
class Check:
    """One finding; `advice` says what to do and is empty if all is well."""

    name: str
    verdict: Literal["ok", "warn", "fail"]
    finding: str
    advice: str = ""


def examine(device: Device, probe: Probe) -> list[Check]:
    """Check everything in the probe."""
    return [
        Check(name="python", verdict="ok", finding=f"{probe.python} on {probe.machine}, kernel {probe.kernel}"),
        *_examine_word_size(probe.machine, probe.userland_bits),
        *_examine_runtimes(device, probe),
        _examine_governor(probe.state.governor),
        _examine_temperature(probe.state.temperature_mc, probe.temperature_of, probe.temperature_doubts),
        *_examine_throttling(probe.throttled),
        _examine_load(probe.state.load_1m_milli, probe.cpu_count),
        *_examine_cpus(device, probe),
        *_examine_swap(probe.swap_used_bytes),
        *_examine_battery(probe.state.battery_percent, probe.battery_status),
        _examine_disk(probe.free_bytes, device.workdir),
        _examine_psutil(device, probe),
    ]


def _examine_runtimes(device: Device, probe: Probe) -> Iterator[Check]:
    """Check what is installed: without its runtime a format cannot be measured, without any runtime nothing can."""
    any_found = any(probe.runtimes.values())
    kit = show_kit_install(device.name)
    for known in FORMATS:
        found = probe.runtimes.get(known)
        if found:
            yield Check(name=known, verdict="ok", finding=" ".join(found))
        else:
            install = show_pip_install(device, FACTS[known].pip_packages, managed=probe.managed)
            advice = f"{kit}; or on the device: {install}"
            yield Check(name=known, verdict="warn" if any_found else "fail", finding="no runtime", advice=advice)
    if probe.numpy is None:
        advice = f"{kit}; or on the device: {show_pip_install(device, 'numpy', managed=probe.managed)}"
        yield Check(name="numpy", verdict="fail", finding="not installed", advice=advice)


def _examine_word_size(machine: str, userland_bits: int | None) -> Iterator[Check]:
    """Check the word size: there are runtimes only for 64 bits."""
    if userland_bits is None:
        return
    if userland_bits == 64:  # noqa: PLR2004 - the word size
        yield Check(name="system", verdict="ok", finding="64-bit userland")
        return
    kernel = "a 64-bit kernel" if machine in _MACHINES_64 else f"{machine}, a 32-bit kernel"
    finding = f"{userland_bits}-bit userland on {kernel} (WrongSystem: no runtime is built for it)"
    advice = "install a 64-bit system, such as Raspberry Pi OS (64-bit)"
    yield Check(name="system", verdict="fail", finding=finding, advice=advice)


def decode_throttled(bits: int) -> tuple[list[str], list[str]]:
    """Return the conditions that a Raspberry Pi's bits report: those of now, and those since it booted."""
    now = [name for bit, name in THROTTLED_BITS.items() if bits >> bit & 1]
    return now, [name for bit, name in THROTTLED_BITS.items() if bits >> (bit + _SINCE_BOOT) & 1]


def _examine_throttling(bits: int | None) -> Iterator[Check]:
    """Check the throttling flags of a Raspberry Pi's firmware; other boards have none."""
    if bits is None:
        return
    now, since_boot = decode_throttled(bits)
    if not now and not since_boot:
        yield Check(name="throttling", verdict="ok", finding="none since boot")
        return
    findings = [f"now: {', '.join(now)}"] if now else []
    findings += [f"since boot: {', '.join(since_boot)}"] if since_boot else []
    volts = any("voltage" in name for name in now + since_boot)
    cause = "use the board's own 5.1 V 3 A supply and a short cable" if volts else "cool it: heat sink and fan"
    advice = cause if now else f"{cause}; `sudo reboot` clears past flags"
    yield Check(name="throttling", verdict="fail" if now else "warn", finding="; ".join(findings), advice=advice)


def _examine_cpus(device: Device, probe: Probe) -> Iterator[Check]:
    """Check that the CPU cores that the inventory names are there."""
    if device.cpus is None:
        return
    there = probe.cpus_online or tuple(range(probe.cpu_count))
    missing = [number for number in device.cpus if number not in there]
    shown = f"{', '.join(map(str, device.cpus)) or 'none'} of {', '.join(map(str, there))}"
    if device.cpus and not missing:
        yield Check(name="cpus", verdict="ok", finding=shown)
        return
    finding = f"{shown}; missing or offline: {', '.join(map(str, missing)) or 'all'}"
    advice = f"correct cpus in the inventory's [{device.name}], or bring the cores online"
    yield Check(name="cpus", verdict="fail", finding=finding, advice=advice)


def _examine_swap(used_bytes: int | None) -> Iterator[Check]:
    """Check the swap: pages read back from a card or a disk while measuring cost milliseconds."""
    if used_bytes is None:
        return
    finding = f"{show_bytes(used_bytes)} in use"
    if used_bytes <= SOME_SWAP_BYTES:
        yield Check(name="swap", verdict="ok", finding=finding)
        return
    advice = "stop the programs that fill the memory, then run on the device: sudo swapoff -a"
    yield Check(name="swap", verdict="warn", finding=finding, advice=advice)


def _examine_battery(percent: int | None, status: str | None) -> Iterator[Check]:
    """Check a phone's battery: with a low one the phone saves power, a charging one heats it."""
    if percent is None:
        return
    finding = f"{percent} %, {status.lower() if status else 'status unknown'}"
    if percent < LOW_BATTERY_PERCENT:
        advice = f"charge it above {LOW_BATTERY_PERCENT} % first: phones slow down to save power"
        yield Check(name="battery", verdict="warn", finding=finding, advice=advice)
    elif status == "Charging":
        advice = "charging heats it and feeds the meter: wait until it is full, or unplug it and use adb over Wi-Fi"
        yield Check(name="battery", verdict="warn", finding=finding, advice=advice)
    else:
        yield Check(name="battery", verdict="ok", finding=finding)


def examine_delegates(probe: Probe, list_delegates: Callable[[Format], Sequence[Delegate]]) -> list[Check]:
    """Say which delegates each runtime has, by the words of suites and recipes; a runtime that fails is a warning."""
    lines, failed = list[str](), list[Check]()
    for known in (one for one, found in probe.runtimes.items() if found):
        try:
            there = list_delegates(known)
        except TargetError as failure:
            failed.append(Check(name="delegates", verdict="warn", finding=f"{known}: {failure}", advice=failure.hint))
        else:
            lines.append(f"{known} {', '.join(one.word for one in DELEGATES[known] if one.delegate in there)}")
    return [*([Check(name="delegates", verdict="ok", finding="; ".join(lines))] if lines else []), *failed]


def examine_clock(clock_utc_ns: int | None, asked_ns: int, answered_ns: int) -> Check:
    """Compare the device's clock with this host's: it was read at some moment between request and answer."""
    if clock_utc_ns is None:
        advice = "the device's times cannot be compared with this host's"
        return Check(name="clock", verdict="warn", finding=_NOT_REPORTED, advice=advice)
    low_ns, high_ns = clock_utc_ns - answered_ns, clock_utc_ns - asked_ns
    finding = f"between {low_ns / 1e9:+.2f} and {high_ns / 1e9:+.2f} s of this host's"
    if low_ns <= CLOCK_OFFSET_NS and high_ns >= -CLOCK_OFFSET_NS:
        return Check(name="clock", verdict="ok", finding=finding)
    advice = "let both follow NTP: sudo timedatectl set-ntp true"
    return Check(name="clock", verdict="warn", finding=finding, advice=advice)


def examine_attached(device: Device, attached: Sequence[tuple[str, str, str]]) -> Check:
    """Check what adb sees, as (serial, state, model): this phone must be there once, and authorised."""
    states = [state for serial, state, _ in attached if serial == device.serial]
    others = f"; {len(attached) - len(states)} others are attached" if len(attached) > len(states) else ""
    if states == ["device"]:
        return Check(name="attached", verdict="ok", finding=f"{device.serial}{others}")
    if len(states) > 1:
        advice = "unplug one of them, or reach one over TCP: `adb tcpip 5600`, `adb connect HOST:5600`"
        finding = f"{len(states)} devices have the serial {device.serial}"
        return Check(name="attached", verdict="fail", finding=finding, advice=advice)
    finding = f"{device.serial} is {states[0] if states else 'not attached'}{others}"
    advice = (
        "accept the computer's key on the phone's screen"
        if states == ["unauthorized"]
        else "plug it in and enable USB debugging; `adb devices -l` lists the phones it sees"
    )
    return Check(name="attached", verdict="fail", finding=finding, advice=advice)


def _examine_governor(governor: str | None) -> Check:
    if governor is None:
        advice = "normal for a virtual machine; compare its latencies only with each other"
        return Check(name="governor", verdict="warn", finding=_NOT_REPORTED, advice=advice)
    if governor == "performance":
        return Check(name="governor", verdict="ok", finding=governor)
    advice = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    return Check(
        name="governor", verdict="warn", finding=f"{governor}: frequencies change while measuring", advice=advice
    )


def _examine_temperature(temperature_mc: int | None, of: str, doubts: Sequence[str]) -> Check:
    """Check how warm the processor is; the finding names the sensor that is believed, and why others are not."""
    more = [f"and {len(doubts) - _SHOWN_DOUBTS} more"] if len(doubts) > _SHOWN_DOUBTS else []
    unused = f"; not believed: {'; '.join([*doubts[:_SHOWN_DOUBTS], *more])}" if doubts else ""
    if temperature_mc is None:
        advice = "throttling by heat will not be noticed: watch for drift inside the runs"
        finding = (of if doubts else _NOT_REPORTED) + unused
        return Check(name="temperature", verdict="warn", finding=finding, advice=advice)
    finding = show_celsius(temperature_mc) + (f" by {of}" if of else "") + unused
    if temperature_mc < WARM_MC:
        return Check(name="temperature", verdict="ok", finding=finding)
    verdict: Literal["warn", "fail"] = "fail" if temperature_mc >= HOT_MC else "warn"
    return Check(
        name="temperature", verdict=verdict, finding=finding, advice="let it cool, or give it a heat sink and a fan"
    )


def _examine_load(load_1m_milli: int | None, cpu_count: int) -> Check:
    if load_1m_milli is None:
        return Check(name="load", verdict="ok", finding=_NOT_REPORTED)
    finding = f"{load_1m_milli / 1000:.2f} over the last minute on {cpu_count} cores"
    if load_1m_milli <= BUSY_SHARE_MILLI * cpu_count:
        return Check(name="load", verdict="ok", finding=finding)
    return Check(
        name="load", verdict="warn", finding=finding, advice="find what runs with `top` on the device, and stop it"
    )


def _examine_disk(free_bytes: int, workdir: str) -> Check:
    finding = f"{show_bytes(free_bytes)} free for {workdir}"
    if free_bytes >= LITTLE_DISK_BYTES:
        return Check(name="disk", verdict="ok", finding=finding)
    verdict: Literal["warn", "fail"] = "fail" if free_bytes < NO_DISK_BYTES else "warn"
    return Check(
        name="disk", verdict=verdict, finding=finding, advice=f"delete old files below {workdir} on the device"
    )


def _examine_psutil(device: Device, probe: Probe) -> Check:
    if probe.psutil:
        return Check(name="psutil", verdict="ok", finding=probe.psutil)
    install = show_pip_install(device, "psutil", managed=probe.managed)
    advice = f"needed only if /sys has no frequency or temperature: {install}"
    return Check(name="psutil", verdict="warn", finding="not installed", advice=advice)
