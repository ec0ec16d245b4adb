"""What only a machine with a kernel of its own suffers in mid-measurement: its clock set, the machine reset."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from make.artifacts import make_request
from rankship_benchmarks.judge.validity import judge_trial, refuse_trials
from rankship_pipeline.foundation.errors import ClockJumped
from rankship_pipeline.foundation.files import hash_file
from rankship_targets.client.detached import make_ticket
from rankship_targets.session.manifest import sign_artifact
from rankship_targets.session.session import open_session
from rankship_targets.transport.copying import copy_many
from rankship_targets.transport.protocol import hash_many, run_checked
from rankship_targets.transport.receiving import PYTHON_FROM_BYTES
from rankship_targets.transport.ssh.connection import open_ssh
from rankship_targets.trials.trial import Trial
from rankship_targets.twin.machine import Machine

pytestmark = [pytest.mark.twin, pytest.mark.system, pytest.mark.slow]
ZONE = "/sys/class/thermal/thermal_zone0/temp"
HOT, COLD = 90_000, 30_000
# Waits until the trial has told its first state, then sets the clock; whoever started it need not wait.
SET_CLOCK = """
(until grep -q '"before"' .cache/rankship/device/runs/*/events.jsonl; do sleep 0.1; done
sudo -n date -s '+1 hour') >/dev/null 2>&1 &
"""


# As a watchdog or a power cut does it: at once, with nothing written out before.
RESET = "(sleep 0.5; sudo -n sh -c 'echo b > /proc/sysrq-trigger') >/dev/null 2>&1 &"
SHELLS_BYTES = 100_000  # the device's shell takes in a file of this size
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


def order(machine: Machine, script: str) -> str:
    """Do something on the machine, over a connection of its own."""
    with open_ssh(machine.device) as transport:
        return run_checked(transport, ["sh", "-c", script])


def write_chance(folder: Path, size_bytes: int) -> tuple[Path, str]:
    """Make a file of chance; gives it and its SHA-256."""
    file = folder / str(size_bytes)
    file.write_bytes(os.urandom(size_bytes))
    return file, hash_file(file)


def heat(machine: Machine, temperature_mc: int) -> None:
    order(machine, f"sudo -n sh -c 'echo {temperature_mc} > {ZONE}'")


def measure(machine: Machine, model: Any, samples: Path, strike: Callable[[], None]) -> Trial:  # noqa: ANN401 - of the conftest
    """Measure, and strike while the machine waits to be cool."""
    sign_artifact(model.path, model.verified, "0" * 64)
    struck: list[str] = []

    def tell(news: str) -> None:
        if "cools down" in news and not struck:
            struck.append(news)
            strike()

    heat(machine, HOT)
    with open_session(replace(machine.device, cool_below_mc=50_000), on_news=tell) as held:
        artifact, inputs = held.push(model.path, model.verified), held.push_file(samples)
        sha256 = model.verified.artifact_sha256
        request = make_request(artifact, sha256, [inputs], min_duration_ms=1000, max_warmup_ms=200)
        ticket = make_ticket()
        trial = held.measure(request, ticket)
        held.forget(ticket)
    return trial


def test_a_trial_in_which_the_clock_was_set_does_not_count(
    system_pi: Machine, models: dict[Any, Any], samples: Path
) -> None:
    def set_clock() -> None:
        order(system_pi, SET_CLOCK)
        heat(system_pi, COLD)

    try:
        trial = measure(system_pi, models["onnx", "dense"], samples, set_clock)
    finally:
        order(system_pi, "sudo -n date -s '-1 hour' >/dev/null")
    assert "clock jumped" in judge_trial(trial)
    assert type(refuse_trials("run", [trial])) is ClockJumped


def test_a_trial_in_which_the_machine_was_reset_is_begun_anew_and_counts_that(
    system_pi: Machine,
    models: dict[Any, Any],
    samples: Path,
    tmp_path: Path,
) -> None:
    boot, struck_s = order(system_pi, BOOT_ID), 0.0
    copied = {f"copied-{size}": write_chance(tmp_path, size) for size in (1, SHELLS_BYTES, PYTHON_FROM_BYTES)}

    def reset() -> None:
        nonlocal struck_s
        struck_s = time.monotonic()
        with open_ssh(system_pi.device) as transport:
            copy_many(transport, copied)
            # It comes up cool: what a test wrote there is forgotten.
            run_checked(transport, ["sh", "-c", RESET])

    trial = measure(system_pi, models["onnx", "dense"], samples, reset)
    sys.stderr.write(f"reset: the trial was there {time.monotonic() - struck_s:.1f} s later\n")
    assert order(system_pi, BOOT_ID) != boot
    assert len(trial.samples_ns) >= 20
    assert trial.retries >= 2, "the lost connection and the beginning anew"
    with open_ssh(system_pi.device) as transport:
        hashes = {name: sha256 for name, (_, sha256) in copied.items()}
        assert hash_many(transport, list(copied)) == hashes, "what had arrived is there after a power cut"
    assert "EXT4-fs error" not in system_pi.serial_log.read_text()
