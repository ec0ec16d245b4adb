"""What a probe reads of a device's own files."""

import sys
import sysconfig
import time
from pathlib import Path

import pytest

from make.agents import call_agent, find_event
from rankship_targets.agent.probe import is_managed


def test_probe_reads_a_pretended_board(tmp_path: Path) -> None:
    write_board(tmp_path)
    events, done = call_agent({"command": "probe", "workdir": str(tmp_path)}, root=tmp_path)
    assert done.returncode == 0, done.stderr
    probe = find_event(events, "probe")
    assert probe["cpu_model"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert probe["memory_bytes"] == 3_884_312 * 1024
    assert probe["free_bytes"] > 0
    assert probe["runtimes"]["onnx"][0] == "onnxruntime"
    assert probe["state"] == {
        "governor": "ondemand",
        "frequency_khz": [600_000, 1_500_000, 700_000],
        "temperature_mc": 48_212,
        "load_1m_milli": 520,
        "available_memory_bytes": 3_000_000 * 1024,
        "boot_id": "6f1c",
        "uptime_ms": 350_740,
        "clock_offset_ns": probe["state"]["clock_offset_ns"],
        "throttled_bits": 0x50005,
        "throttle_count": None,
        "cooling_steps": 2,
        "battery_percent": 81,
        "charging": False,
    }
    assert abs(time.time_ns() - time.monotonic_ns() - probe["state"]["clock_offset_ns"]) < 10**9


def test_probe_of_a_board_that_tells_nothing_says_none(tmp_path: Path) -> None:
    events, _ = call_agent({"command": "probe", "workdir": str(tmp_path)}, root=tmp_path / "empty")
    state = find_event(events, "probe")["state"]
    assert state.pop("clock_offset_ns")
    assert set(state.values()) == {None}


def write_board(root: Path) -> None:
    files = {
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/meminfo": "MemTotal:        3884312 kB\nMemFree: 1 kB\nMemAvailable:    3000000 kB\n",
        "proc/uptime": "350.74 1234.56\n",
        "proc/sys/kernel/random/boot_id": "6f1c\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
        "sys/class/thermal/cooling_device0/cur_state": "2\n",
        "sys/class/thermal/cooling_device1/type": "gpio-fan\n",
        "sys/class/thermal/cooling_device1/cur_state": "1\n",
        "sys/class/power_supply/mouse/type": "Battery\n",
        "sys/class/power_supply/mouse/scope": "Device\n",
        "sys/class/power_supply/mouse/capacity": "12\n",
        "sys/class/power_supply/own/type": "Battery\n",
        "sys/class/power_supply/own/capacity": "81\n",
        "sys/class/power_supply/own/status": "Discharging\n",
        "proc/loadavg": "0.52 0.58 0.59 1/300 999\n",
        "sys/class/thermal/thermal_zone0/temp": "48212\n",
        "sys/class/thermal/thermal_zone1/temp": "31000\n",
        "sys/class/thermal/thermal_zone2/temp": "N/A\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
        "sys/devices/system/cpu/cpu2/cpufreq/scaling_cur_freq": "1500000\n",
        "sys/devices/system/cpu/cpu10/cpufreq/scaling_cur_freq": "700000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        "sys/devices/system/cpu/cpu2/cpufreq/scaling_governor": "ondemand\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_python_that_takes_no_packages_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert not is_managed()
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    assert is_managed()
    monkeypatch.setattr(sys, "prefix", "/an/environment")
    assert not is_managed()
