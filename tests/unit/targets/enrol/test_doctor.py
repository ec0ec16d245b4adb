"""What the agent reads of a device's health and what the doctor makes of it."""

import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.delegates import DELEGATES
from rankship_pipeline.foundation.errors import AgentDied
from rankship_pipeline.foundation.formats import Format
from rankship_targets.agent import probe, system
from rankship_targets.devices.device import Device
from rankship_targets.enrol.doctor import (
    Check,
    decode_throttled,
    examine,
    examine_attached,
    examine_clock,
    examine_delegates,
)
from rankship_targets.trials.events import Probe
from rankship_targets.trials.trial import DeviceState

DEVICE = Device(name="pi4", transport="ssh", host="pi4.local", user="pi", host_key="k")
STATE = DeviceState(
    governor="performance", frequency_khz=None, temperature_mc=40_000, load_1m_milli=10, available_memory_bytes=None
)
AT_12_PERCENT, AT_80_PERCENT = (replace(STATE, battery_percent=percent) for percent in (12, 80))
PROBE = Probe(
    event="probe",
    python="3.11.2",
    machine="aarch64",
    kernel="6.6",
    cpu_count=4,
    cpu_model="Raspberry Pi 4",
    memory_bytes=None,
    free_bytes=10**10,
    runtimes={"onnx": ("onnxruntime", "1"), "tflite": ("ai-edge-litert", "2"), "executorch": ("executorch", "1")},
    numpy="2",
    psutil="7",
    state=STATE,
    userland_bits=64,
    throttled=0,
    swap_used_bytes=0,
    cpus_online=(0, 1, 2, 3),
)


def find(name: str, device: Device = DEVICE, **changes: Any) -> Check:  # noqa: ANN401 - any field of the probe
    (found,) = [check for check in examine(device, replace(PROBE, **changes)) if check.name == name]
    return found


def test_a_healthy_board_passes_every_check() -> None:
    checks = examine(replace(DEVICE, cpus=(2, 3)), PROBE)
    assert [check.name for check in checks if check.verdict != "ok"] == []


@pytest.mark.parametrize(
    ("bits", "verdict", "finding", "advice"),
    [
        (0x50005, "fail", "now: under-voltage, throttled; since boot: under-voltage, throttled", "supply"),
        (0x40000, "warn", "since boot: throttled", "sudo reboot"),
        (0x80008, "fail", "now: at the soft temperature limit; since boot: at the soft temperature limit", "fan"),
        (0x20002, "fail", "now: frequency capped; since boot: frequency capped", "fan"),
        (0, "ok", "none since boot", ""),
    ],
)
def test_throttling_is_decoded(bits: int, verdict: str, finding: str, advice: str) -> None:
    check = find("throttling", throttled=bits)
    assert (check.verdict, check.finding) == (verdict, finding)
    assert advice in check.advice


@pytest.mark.parametrize(
    ("name", "changes", "verdict", "advice"),
    [
        ("system", {"userland_bits": 32}, "fail", "64-bit"),
        ("system", {"userland_bits": 32, "machine": "armv7l"}, "fail", "64-bit"),
        ("swap", {"swap_used_bytes": 10**8}, "warn", "swapoff"),
        (
            "battery",
            {"state": replace(STATE, battery_percent=12), "battery_status": "Discharging"},
            "warn",
            "charge it",
        ),
        ("battery", {"state": replace(STATE, battery_percent=80), "battery_status": "Charging"}, "warn", "unplug"),
        ("battery", {"state": replace(STATE, battery_percent=100), "battery_status": "Full"}, "ok", ""),
        ("onnx", {"runtimes": {"tflite": ("ai-edge-litert", "2")}}, "warn", "rankship kit install pi4"),
        ("numpy", {"numpy": None}, "fail", "rankship kit install pi4"),
    ],
)
def test_each_point_has_its_command(name: str, changes: dict[str, Any], verdict: str, advice: str) -> None:
    check = find(name, **changes)
    assert check.verdict == verdict
    assert advice in check.advice


def test_the_temperature_names_whose_it_is_and_which_are_not_believed() -> None:
    doubts = tuple(f"zone{n} tells 125.0 °C" for n in range(8))
    state = replace(STATE, temperature_mc=41_200)
    check = find("temperature", state=state, temperature_of="mtktscpu", temperature_doubts=doubts)
    assert check.verdict == "ok"
    assert check.finding.startswith("41.2 °C by mtktscpu; not believed: zone0 tells 125.0 °C; ")
    assert check.finding.endswith("; and 2 more")
    state = replace(STATE, temperature_mc=None)
    check = find("temperature", state=state, temperature_of="no temperature is believed", temperature_doubts=doubts[:1])
    assert check.verdict == "warn"
    assert check.finding == "no temperature is believed; not believed: zone0 tells 125.0 °C"


@pytest.mark.parametrize(("managed", "command"), [(True, "-m venv"), (False, "`python3 -m pip install numpy`")])
def test_a_system_python_that_takes_no_packages_gets_an_environment(managed: bool, command: str) -> None:  # noqa: FBT001
    check = find("numpy", numpy=None, managed=managed)
    assert command in check.advice
    assert ("environment" in check.advice) == managed


@pytest.mark.parametrize("cpus", [(4,), (0, 7), ()])
def test_processors_that_do_not_exist_are_found(cpus: tuple[int, ...]) -> None:
    assert find("cpus", replace(DEVICE, cpus=cpus)).verdict == "fail"


def test_what_a_device_does_not_tell_is_no_check() -> None:
    silent = replace(PROBE, userland_bits=None, throttled=None, swap_used_bytes=None, cpus_online=None)
    names = {check.name for check in examine(DEVICE, silent)}
    assert names & {"system", "throttling", "swap", "cpus", "battery"} == set()


@pytest.mark.parametrize(
    ("clock_s", "verdict"), [(100.0, "ok"), (103.0, "ok"), (98.5, "warn"), (104.5, "warn"), (0.0, "warn")]
)
def test_the_clock_is_judged_only_by_what_the_round_trip_leaves_no_doubt_of(clock_s: float, verdict: str) -> None:
    assert examine_clock(int(clock_s * 1e9), 100 * 10**9, 103 * 10**9).verdict == verdict


@pytest.mark.parametrize(
    ("attached", "verdict", "said"),
    [
        ([("S1", "device", "Pixel 6"), ("S2", "device", "Pixel 7")], "ok", "1 others"),
        ([("S1", "device", "a"), ("S1", "device", "b")], "fail", "2 devices have"),
        ([("S1", "unauthorized", "")], "fail", "unauthorized"),
        ([("S1", "offline", "")], "fail", "offline"),
        ([("S2", "device", "")], "fail", "not attached"),
        ([], "fail", "not attached"),
    ],
)
def test_what_adb_sees_is_judged(attached: list[tuple[str, str, str]], verdict: str, said: str) -> None:
    phone = Device(name="pixel6", transport="adb", serial="S1")
    check = examine_attached(phone, attached)
    assert check.verdict == verdict
    assert said in check.finding
    assert bool(check.advice) == (verdict != "ok")


def test_throttled_bits_of_the_manual() -> None:
    words = ["under-voltage", "frequency capped", "throttled", "at the soft temperature limit"]
    assert decode_throttled(0xF000F) == (words, words)
    assert decode_throttled(0x20001) == (["under-voltage"], ["frequency capped"])


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("throttled=0x50005\n", 0x50005),
        ("throttled=0x0", 0),
        ("50005", 0x50005),
        ("", None),
        ("VCHI initialization failed", None),
        ("throttled=", None),
    ],
)
def test_the_firmwares_word_is_parsed(text: str, bits: int | None) -> None:
    assert system.parse_throttled(text) == bits


DUMPSYS = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Max charging current: 500000
  status: 2
  health: 2
  present: true
  level: 57
  scale: 100
"""


def test_androids_battery_is_parsed() -> None:
    assert system.parse_battery(DUMPSYS) == (57, "Charging")
    assert system.parse_battery("Can't find service: battery") == (None, None)


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3", [0, 1, 2, 3]), ("0", [0]), ("0-1,4,6-7", [0, 1, 4, 6, 7]), ("", None)]
)
def test_the_kernels_list_of_processors_is_parsed(text: str, cpus: list[int] | None) -> None:
    assert probe.parse_cpus(text) == cpus


@given(st.text(max_size=80))
def test_no_text_makes_the_parsers_fail(text: str) -> None:
    bits, cpus, (percent, _) = system.parse_throttled(text), probe.parse_cpus(text), system.parse_battery(text)
    assert bits is None or bits >= 0
    assert cpus is None or all(number >= 0 for number in cpus)
    assert percent is None or 0 <= percent <= 999


def test_a_pretended_boards_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n",
        "proc/meminfo": "MemTotal: 4000 kB\nSwapTotal:  1000 kB\nSwapFree:  400 kB\n",
        "sys/devices/system/cpu/online": "0-3\n",
        "sys/class/power_supply/battery/type": "Battery\n",
        "sys/class/power_supply/battery/capacity": "61\n",
        "sys/class/power_supply/battery/status": "Discharging\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    found = probe.read_health()
    assert found.pop("clock_utc_ns") > 0
    assert found == {
        "userland_bits": struct.calcsize("P") * 8,
        "throttled": 0x50000,
        "swap_used_bytes": 600 * 1024,
        "cpus_online": [0, 1, 2, 3],
    }
    (seen, _) = probe.probe({"workdir": str(tmp_path)})
    assert (seen["state"]["battery_percent"], seen["state"]["charging"]) == (61, False)
    assert seen["battery_status"] == "Discharging"


def test_a_program_that_hangs_or_fails_is_an_empty_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in (("hangs", "sleep 60"), ("fails", "echo no; exit 1"), ("noise", "printf '\\377'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(system, "PROGRAM_TIMEOUT_S", 0.2)
    assert [system.run_program(name) for name in ("hangs", "fails", "noise", "absent")] == ["", "", "", ""]
    assert system.run_program(sys.executable, "-c", "print('said')") == "said\n"


def test_a_runtime_whose_delegates_cannot_be_listed_leaves_the_others_theirs() -> None:
    def list_delegates(known: Format) -> Sequence[Delegate]:
        if known == "tflite":
            raise AgentDied("the agent died of SIGILL", hint="install another build")
        return [one.delegate for one in DELEGATES[known]]

    listed, failed = examine_delegates(PROBE, list_delegates)
    assert (listed.verdict, listed.finding.count(";")) == ("ok", 1)
    assert listed.finding.startswith("onnx cpu")
    assert (failed.verdict, failed.finding) == ("warn", "tflite: the agent died of SIGILL")
