"""The system stand-in: a kernel of its own, memory that is true, a reboot, a spoiled network, counted instructions."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from make.waiting import wait_until
from rankship_pipeline.foundation.errors import ConnectionLost, InputError, TargetError, TargetTimeout
from rankship_targets.session.instructions import count_instructions
from rankship_targets.session.session import open_session
from rankship_targets.transport.protocol import Transport, run_checked
from rankship_targets.transport.ssh.connection import open_ssh
from rankship_targets.twin import board
from rankship_targets.twin.machine import Machine

pytestmark = [pytest.mark.twin, pytest.mark.system, pytest.mark.slow]

BOOT_ID = "/proc/sys/kernel/random/boot_id"
BACK_S = 300.0
MEGABYTE = 1 << 20


def script(transport: Transport, text: str) -> str:
    return run_checked(transport, ["sh", "-c", text])


def test_it_boots_as_a_raspberry_pi_with_four_cores(system_pi: Machine) -> None:
    with open_session(system_pi.device) as session:
        probe = session.probe()
    assert (probe.machine, probe.cpu_count, probe.cpu_model) == ("aarch64", board.CORES, board.MODEL)
    assert probe.state.temperature_mc == 48_212
    assert probe.runtimes["onnx"]
    assert probe.runtimes["tflite"]
    assert "the board is up" in system_pi.serial_log.read_text()
    with open_ssh(system_pi.device) as transport:
        assert script(transport, "grep -c 0xd08 /proc/cpuinfo").strip() == "4"
        assert "asimddp" not in script(transport, "cat /proc/cpuinfo")


def test_its_memory_figures_are_true(system_pi: Machine) -> None:
    ask = (
        "import re; status = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "before = status(); block = bytearray(b'x') * (64 << 20); after = status(); print(before, after)"
    )
    with open_ssh(system_pi.device) as transport:
        before, after = map(int, run_checked(transport, ["/usr/bin/python3", "-c", ask]).split())
    assert before < 16 * MEGABYTE, "qemu-user would show the translator's own"
    assert after - before == pytest.approx(64 * MEGABYTE, abs=2 * MEGABYTE)


def test_its_network_can_be_spoiled_from_inside(system_pi: Machine) -> None:
    with open_ssh(system_pi.device) as transport:
        script(transport, "sudo -n tc qdisc add dev eth0 root netem delay 20ms loss 1%")
        assert "netem" in script(transport, "sudo -n tc qdisc show dev eth0")
        script(transport, "sudo -n tc qdisc del dev eth0 root")


def test_it_reboots_when_told_over_ssh(system_pi: Machine) -> None:
    with open_ssh(system_pi.device) as transport:
        before = script(transport, f"echo kept > kept; sync; cat {BOOT_ID}")
        with suppress(TargetError):
            transport.run(["sudo", "-n", "reboot"], timeout_s=10)
    end, after = time.monotonic() + BACK_S, before
    while after == before and time.monotonic() < end:
        with suppress(ConnectionLost, TargetTimeout), open_ssh(system_pi.device) as transport:
            after = script(transport, f"cat {BOOT_ID}")
            kept = script(transport, "cat kept")
    assert after != before
    assert kept == "kept\n"


@pytest.mark.parametrize(("kind", "repeats"), [("onnx", 2), ("tflite", 1)])  # each takes many seconds
def test_low_rank_costs_fewer_instructions_and_every_run_counts_nearly_the_same(
    icount_machine: Machine, models: dict[Any, Any], samples: Path, kind: str, repeats: int
) -> None:
    def count(variant: str) -> int:
        model = models[kind, variant]
        return count_instructions(icount_machine, model.path, model.verified, [samples]).per_inference

    dense, compressed = [count("dense") for _ in range(repeats)], count("compressed")
    # Repeats differ by some hundred instructions, whatever a model costs: that is much of so small a one.
    assert max(dense) - min(dense) <= 0.005 * min(dense), dense
    assert compressed < 0.75 * min(dense)  # with an eighth of the products: what a runtime does besides stays


def test_a_machine_that_tells_time_counts_nothing(system_pi: Machine, models: dict[Any, Any], samples: Path) -> None:
    model = models["onnx", "dense"]
    with pytest.raises(InputError, match="measures time"):
        count_instructions(system_pi, model.path, model.verified, [samples])


HOST = """
import json, time
from rankship_targets.twin.machine import Machine, boot
Machine.await_answer = lambda _: None  # to be killed it need not have booted
print(json.dumps(boot(name="brief").process.pid), flush=True)
time.sleep(600)
"""


@pytest.mark.usefixtures("able_qemu")
def test_nothing_runs_on_after_kill_9_of_its_host(
    await_gone: Callable[[list[psutil.Process]], None], tmp_path: Path
) -> None:
    own = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed host cannot take its machine's folder away
    with subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, text=True, env=own) as host:
        assert host.stdout is not None
        warden = psutil.Process(json.loads(host.stdout.readline()))
        wait_until(lambda: any("qemu" in process.name() for process in warden.children()))
        family = [warden, *warden.children(recursive=True)]
        host.kill()
        await_gone(family)
