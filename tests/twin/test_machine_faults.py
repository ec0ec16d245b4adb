"""What only a machine with a kernel of its own suffers in mid-measurement: its clock set."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rankship_benchmarks.validity import judge_trial, refuse_trials
from rankship_pipeline.errors import ClockJumped
from rankship_targets.detached import make_ticket
from rankship_targets.manifest import sign_artifact
from rankship_targets.session import MeasureRequest, open_session
from rankship_targets.ssh import open_ssh
from rankship_targets.transport import run_checked
from rankship_targets.trial import Trial
from rankship_targets.twin.machine import Machine

pytestmark = [pytest.mark.twin, pytest.mark.system, pytest.mark.slow]
ZONE = "/sys/class/thermal/thermal_zone0/temp"
HOT, COLD = 90_000, 30_000
# Waits until the trial has told its first state, then sets the clock; whoever started it need not wait.
SET_CLOCK = """
(until grep -q '"before"' .cache/rankship/device/runs/*/events.jsonl; do sleep 0.1; done
sudo -n date -s '+1 hour') >/dev/null 2>&1 &
"""


def order(machine: Machine, script: str) -> None:
    """Do something on the machine, over a connection of its own."""
    with open_ssh(machine.device) as transport:
        run_checked(transport, ["sh", "-c", script])


def heat(machine: Machine, temperature_mc: int) -> None:
    order(machine, f"sudo -n sh -c 'echo {temperature_mc} > {ZONE}'")


def measure(machine: Machine, model: Any, samples: Path, script: str) -> Trial:  # noqa: ANN401 - of the conftest
    """Measure, with a script on the machine while it waits to be cool, then cool."""
    sign_artifact(model.path, model.verified, "0" * 64)

    def tell(news: str) -> None:
        if "cools down" in news:
            order(machine, script)
            heat(machine, COLD)

    heat(machine, HOT)
    with open_session(replace(machine.device, cool_below_mc=50_000), tell=tell) as held:
        request = MeasureRequest(
            round=0,
            variant="dense",
            format="onnx",
            artifact=held.push(model.path, model.verified),
            artifact_sha256=model.verified.artifact_sha256,
            inputs=(held.push_file(samples),),
            threads=1,
            min_samples=20,
            min_duration_ms=1000,
            max_warmup_ms=200,
        )
        ticket = make_ticket()
        trial = held.measure(request, ticket)
        held.forget(ticket)
    return trial


def test_a_trial_in_which_the_clock_was_set_does_not_count(
    system_pi: Machine, models: dict[Any, Any], samples: Path
) -> None:
    try:
        trial = measure(system_pi, models["onnx", "dense"], samples, SET_CLOCK)
    finally:
        order(system_pi, "sudo -n date -s '-1 hour' >/dev/null")
    assert "clock jumped" in judge_trial(trial)
    assert type(refuse_trials("run", [trial])) is ClockJumped
