"""A Raspberry Pi 4's description in /proc and /sys, as files that qemu shows to every emulated program."""

import uuid
from pathlib import Path

MODEL = "Raspberry Pi 4 Model B Rev 1.4"
COMPATIBLE = ("raspberrypi,4-model-b", "brcm,bcm2711")
CORES = 4
KERNEL = "6.6.51+rpt-rpi-v8"
MEMORY_KB = 3_884_376
BOOT_ID = "proc/sys/kernel/random/boot_id"
TEMPERATURE = "sys/class/thermal/thermal_zone0/temp"
THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
CPUFREQ = "sys/devices/system/cpu/cpu{core}/cpufreq"

_CORE = """processor\t: {core}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
_MEMORY = {
    "MemTotal": MEMORY_KB,
    "MemFree": 3_120_000,
    "MemAvailable": 3_490_000,
    "Buffers": 31_000,
    "Cached": 402_000,
    "SwapTotal": 0,
    "SwapFree": 0,
}
_FREQUENCY = {
    "scaling_governor": "ondemand",
    "scaling_available_governors": "conservative ondemand userspace powersave performance schedutil",
    "scaling_available_frequencies": "600000 700000 800000 900000 1000000 1100000 1200000 1300000 1400000 1500000",
    "scaling_cur_freq": "1500000",
    "scaling_min_freq": "600000",
    "scaling_max_freq": "1500000",
    "cpuinfo_min_freq": "600000",
    "cpuinfo_max_freq": "1500000",
}


def write_board(folder: Path) -> None:
    """Write the board's files below `folder`; they are plain, and a test may rewrite them while programs run."""
    cores = range(CORES)
    texts = {
        "proc/cpuinfo": "".join(_CORE.format(core=core) for core in cores) + f"Model\t\t: {MODEL}\n",
        "proc/meminfo": "".join(f"{name + ':':<16}{value:>8} kB\n" for name, value in _MEMORY.items()),
        "proc/loadavg": "0.08 0.03 0.01 1/141 612\n",
        "proc/device-tree/model": f"{MODEL}\0",
        "proc/device-tree/compatible": "".join(f"{name}\0" for name in COMPATIBLE),
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        TEMPERATURE: "48212\n",
        THROTTLED: "0\n",
        **{f"sys/devices/system/cpu/{name}": f"0-{CORES - 1}\n" for name in ("online", "possible", "present")},
        **{f"{CPUFREQ.format(core=core)}/{name}": f"{text}\n" for core in cores for name, text in _FREQUENCY.items()},
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    renew_boot_id(folder)


def renew_boot_id(folder: Path) -> None:
    """Give the board a new boot id, as after a start."""
    path = folder / BOOT_ID
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{uuid.uuid4()}\n", encoding="ascii")
