"""Runtimes that are separate programs without a Python binding; requests and events are the same."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from .limits import read_limits
from .protocol import Event, Fault, Request
from .state import read_state
from .system import SYSTEM

# format → the variable that names its program; a kit's launcher sets it.
VARIABLES = {"executorch": "RANKSHIP_EXECUTORCH_RUNNER"}
VERSION_TIMEOUT_S = 60


class Program(NamedTuple):
    """A program that runs on this device: the name and version that it reports, and its path."""

    name: str
    version: str
    path: str


def find_program(artifact_format: str) -> Program | None:
    """Find a format's program; None if no kit installed one, Fault lacks_runtime if it cannot be started."""
    path = os.environ.get(VARIABLES.get(artifact_format, ""))
    if not path:
        return None
    try:
        done = subprocess.run(
            [path, "version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=VERSION_TIMEOUT_S, check=True
        )
        reported = json.loads(done.stdout)
        return Program(reported["runtime"], reported["version"], path)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as failure:
        raise Fault("lacks_runtime", f"{path} does not run here: {failure}") from failure


def hash_program(path: str) -> str | None:
    """Return the SHA-256 of a program's file; None if it cannot be read."""
    try:
        with open(path, "rb") as stream:  # noqa: PTH123 - a name, not a path
            return hashlib.sha256(stream.read()).hexdigest()
    except OSError:
        return None


def load_with(program: Program, request: Request) -> Iterator[Event]:
    """Load the artifact with the program, without an inference."""
    yield from _follow(program, "load", {**request, "inputs": []}, [])


def infer_with(program: Program, request: Request, options: list[str] | None = None) -> Iterator[Event]:
    """Run every sample with the program, which writes the .npy files itself."""
    if (request.get("rows") or 1) > 1:
        raise Fault("bad_request", f"{program.name}'s program takes one sample at a time, {request['rows']} were asked")
    yield from _follow(program, "infer", request, ["--output", request["output"], *(options or [])])


def measure_with(program: Program, request: Request) -> Iterator[Event]:
    """Time single inferences of the first sample with the program; the device's state is read before and after."""
    yield {"event": "state", "when": "before", "state": read_state()}
    limits = [("min_samples", "--min-samples"), ("min_duration_ms", "--min-duration-ms")]
    limits.append(("max_warmup_ms", "--max-warmup-ms"))
    options = [argument for name, flag in limits for argument in (flag, str(request[name]))]
    for event in _follow(program, "measure", request, options):
        if event["event"] == "warmed":  # sent after the timed loop
            yield {"event": "state", "when": "after", "state": read_state()}
        yield event


def generate_with(program: Program, request: Request) -> Iterator[Event]:
    """Continue a prompt with the program."""
    options = ["--new-tokens", str(request["new_tokens"])]
    yield from _follow(program, "generate", request, [*options, *(f"--end={token}" for token in request["ends"])])


def _follow(program: Program, verb: str, request: Request, options: list[str]) -> Iterator[Event]:
    """Run the program and pass on its events; it exits by itself when nobody reads them any more."""
    options = ["--threads", str(request["threads"]), *options, *_limit_tokens(request)]
    argv = [program.path, verb, *options, "--", request["artifact"], *request["inputs"]]
    last, loaded = "", False
    identity = {"process": "program", "binary_sha256": hash_program(program.path)}
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        for line in process.stdout or ():
            event = json.loads(line)
            last = event["event"]
            loaded = loaded or last == "loaded"
            if last == "error":
                raise Fault(event["kind"], event["message"])
            if last == "opened":
                event["runtime"] = {"name": program.name, "version": program.version, **SYSTEM, **identity}
            yield event
    if last != "done":
        code = process.returncode
        cause = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        kind = "failed" if loaded or verb == "infer" else "bad_artifact"
        raise Fault(kind, f"{program.path} {cause} and without a last event on {request['artifact']}")


def _limit_tokens(request: Request) -> list[str]:
    if not request.get("generation"):
        return []
    limits = read_limits(request)
    phase = [] if request.get("phase") is None else ["--phase", str(request["phase"])]
    return ["--prompt-tokens", str(limits.prompt), "--context", str(limits.context), *phase]
