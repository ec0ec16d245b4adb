"""Answers the request in argv with events on stdout; exits when the host closes the connection."""

from __future__ import annotations

import errno
import json
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from .conditions import settle
from .generate import generate
from .governor import restore, tune
from .meter import list_meters, sample_meter
from .probe import probe
from .profiles import profile
from .protocol import PROTOCOL, Event, Fault, Request
from .rest import rest_around
from .runs import cancel, fetch
from .runtimes import RUNTIMES
from .spool import spool
from .sweep import sweep
from .taken import inspect, list_delegates
from .timing import infer, load, measure

NOISE = {"TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
EXIT_FAILED, EXIT_UNHEARD = 1, 3

Command = Callable[[Request], Iterator[Event]]

LIMITS = "min_samples min_duration_ms max_warmup_ms cpus? cool_below_mc? max_cooling_ms?"
# command → its function and the fields of its request; a field that ends in "?" may be absent or null.
COMMANDS: dict[str, tuple[Command, str]] = {
    "probe": (probe, "workdir"),
    "delegates": (list_delegates, "format"),
    "inspect": (inspect, "format artifact inputs threads delegate?"),
    "load": (load, "format artifact threads delegate?"),
    "infer": (infer, "format artifact inputs output threads rows? generation? delegate?"),
    "measure": (
        lambda request: settle(request, lambda calm: rest_around(calm, measure)),
        f"format artifact inputs threads {LIMITS} idle_ms? generation? phase? beside_bytes? delegate?",
    ),
    "generate": (generate, "format artifact inputs threads generation new_tokens ends delegate?"),
    "profile": (profile, "format artifact inputs threads runs"),
    "sweep": (lambda request: settle(request, sweep), f"format artifacts inputs threads {LIMITS} own? delegate?"),
    "meters": (list_meters, "period_us current_unit? voltage_unit?"),
    "meter": (sample_meter, "meter period_us duration_ms current_unit? voltage_unit?"),
    "spool": (lambda request: spool(request, answer), "workdir run request"),
    "fetch": (fetch, "workdir run offset"),
    "cancel": (cancel, "workdir run"),
    "tune": (tune, "workdir governor"),
    "restore": (restore, "workdir"),
}
ATTENDED = {"spool", "fetch", "cancel"}  # these cannot be run detached
INTEGERS = {
    *("threads", "min_samples", "min_duration_ms", "max_warmup_ms", "cool_below_mc", "max_cooling_ms", "offset"),
    *("period_us", "duration_ms", "idle_ms", "runs", "rows", "new_tokens", "beside_bytes"),
}
LISTS = {"artifacts", "inputs", "cpus", "ends", "own"}
TABLES = {"request", "generation"}
# Fields of other names are texts.
TYPES: dict[str, type] = {**dict.fromkeys(TABLES, dict), **dict.fromkeys(LISTS, list), **dict.fromkeys(INTEGERS, int)}
DISK_FAULTS = {errno.ENOSPC: "no_space", errno.EDQUOT: "no_space", errno.EROFS: "read_only"}


def answer(text: str) -> Iterator[Event]:
    """Carry out one request; every failure becomes the last event."""
    try:
        command, request = parse_request(text)
        yield from command(request)
    except Fault as fault:
        yield {"event": "error", "kind": fault.args[0], "message": fault.args[1]}
    except Exception as failure:  # noqa: BLE001 - the host must learn of every failure
        traceback.print_exc()
        kind = DISK_FAULTS.get(getattr(failure, "errno", None) or 0, "failed")
        yield {"event": "error", "kind": kind, "message": f"{type(failure).__name__}: {failure}"}


def parse_request(text: str) -> tuple[Command, Request]:
    """Parse a request; Fault bad_request for anything unknown, missing or of another type."""
    try:
        request = json.loads(text)
        command, fields = COMMANDS[request["command"]]
        wrong = [field for field in fields.split() if not is_given(request, field)]
        wrong += [name for name in request if name not in {*fields.replace("?", "").split(), "command"}]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as failure:
        raise Fault("bad_request", f"not a request: {type(failure).__name__}: {failure}") from failure
    least = {} if wrong else {name: request.get(name, 1) for name in ("threads", "new_tokens")}
    if wrong or request.get("format", "onnx") not in RUNTIMES or min(least.values()) < 1:
        raise Fault("bad_request", f"wrong in the request: {wrong or request}")
    if request["command"] == "spool":
        parse_request(json.dumps(request["request"]))
        if request["request"]["command"] in ATTENDED:
            raise Fault("bad_request", f"{request['request']['command']} cannot be run detached")
    return command, request


def is_given(request: Request, field: str) -> bool:
    """Return whether a field has its type; an optional one may also be absent or null."""
    name = field.rstrip("?")
    value: Any = request.get(name)
    return type(value) is TYPES.get(name, str) or (value is None and name != field)


def end_when_unheard(descriptor: int) -> None:
    """Wait until the host closes the connection, then exit at once: an abandoned run would disturb the next."""
    waiting = select.poll()
    waiting.register(descriptor, 0)
    waiting.poll()
    os._exit(EXIT_UNHEARD)


def main() -> None:
    """Answer the request in argv; exits without the runtimes' exit handlers, which may crash."""
    descriptor = os.dup(1)  # only for the protocol; other output on stdout goes to stderr from here on
    os.dup2(2, 1)
    threading.Thread(target=end_when_unheard, args=(descriptor,), daemon=True).start()
    os.environ.update(NOISE)
    event: Event = {"event": "hello", "protocol": PROTOCOL}
    with os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) as protocol:
        try:
            print(json.dumps(event), file=protocol)
            for event in answer(sys.argv[1] if len(sys.argv) > 1 else ""):
                print(json.dumps(event), file=protocol)
        except BrokenPipeError:  # the host closed the connection, seen here before the thread saw it
            os._exit(EXIT_UNHEARD)
        sys.stdout.flush()  # what runtimes printed; _exit would lose it
        os._exit(EXIT_FAILED if event["event"] == "error" else 0)
