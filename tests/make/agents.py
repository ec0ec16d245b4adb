"""The agent asked as a host asks it: a file, a request, lines of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rankship_targets.client.agent_file import find_agent


def call_agent(
    request: object, *, root: Path | None = None, path: Path | None = None, runner: Path | None = None
) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """Have the packed agent answer on this machine; gives its events, and the process that has ended.

    `root` is where it reads sensors, `path` where Python finds modules first, `runner` the program for ExecuTorch.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RANKSHIP_EXECUTORCH_RUNNER"}
    more = {"RANKSHIP_AGENT_ROOT": root, "PYTHONPATH": path, "RANKSHIP_EXECUTORCH_RUNNER": runner}
    environment |= {name: str(value) for name, value in more.items() if value}
    text = request if isinstance(request, str) else json.dumps(request)
    done = subprocess.run(
        [sys.executable, find_agent(), text], capture_output=True, text=True, env=environment, check=False, timeout=200
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done


def ask_infer(model: Path, **changes: object) -> dict[str, object]:
    request: dict[str, object] = {"command": "infer", "format": "onnx", "artifact": str(model), "threads": 1}
    return {**request, "inputs": [str(model.parent / "x.npy")], "output": str(model.parent / "out"), **changes}


def ask_measure(model: Path, **changes: object) -> dict[str, object]:
    request = {key: value for key, value in ask_infer(model).items() if key != "output"}
    return {**request, "command": "measure", "min_samples": 20, "min_duration_ms": 5, "max_warmup_ms": 2000, **changes}


def find_event(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (event,) = [event for event in events if event["event"] == name]
    return event
