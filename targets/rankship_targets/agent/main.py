"""From one request in argv to the events that answer it; the agent ends when nobody listens any more."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from .meter import list_meters, sample_meter
from .probe import probe
from .protocol import PROTOCOL, Event, Fault, Request
from .runtimes import RUNTIMES
from .timing import infer, measure

NOISE = {"TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
EXIT_FAILED, EXIT_UNHEARD = 1, 3

Command = Callable[[Request], Iterator[Event]]
# command → its function and what a request must hold.
COMMANDS: dict[str, tuple[Command, str]] = {
    "probe": (probe, "workdir"),
    "infer": (infer, "format artifact inputs output threads"),
    "meters": (list_meters, "period_us"),
    "meter": (sample_meter, "meter period_us duration_ms"),
    "measure": (measure, "format artifact inputs threads min_samples min_duration_ms max_warmup_ms"),
}
INTEGERS = {"threads", "min_samples", "min_duration_ms", "max_warmup_ms", "period_us", "duration_ms"}
TYPES = {"inputs": list, **dict.fromkeys(INTEGERS, int)}  # others: str


def answer(text: str) -> Iterator[Event]:
    """Carry out one request; every failure becomes the last event."""
    try:
        command, request = parse_request(text)
        yield from command(request)
    except Fault as fault:
        yield {"event": "error", "kind": fault.args[0], "message": fault.args[1]}
    except Exception as failure:  # noqa: BLE001 - the host must hear of everything
        traceback.print_exc()
        yield {"event": "error", "kind": "failed", "message": f"{type(failure).__name__}: {failure}"}


def parse_request(text: str) -> tuple[Command, Request]:
    """Parse a request; anything unknown, missing or of another type is bad_request."""
    try:
        request = json.loads(text)
        command, fields = COMMANDS[request["command"]]
        wrong = [name for name in fields.split() if type(request.get(name)) is not TYPES.get(name, str)]
        wrong += [name for name in request if name not in {*fields.split(), "command"}]
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        raise Fault("bad_request", f"no request: {type(failure).__name__}: {failure}") from failure
    if wrong or request.get("format", "onnx") not in RUNTIMES or request.get("threads", 1) < 1:
        raise Fault("bad_request", f"wrong in the request: {wrong or request}")
    return command, request


def end_when_unheard(descriptor: int) -> None:
    """Wait until the host hangs up, then end at once: a forgotten run would disturb the next."""
    waiting = select.poll()
    waiting.register(descriptor, 0)
    waiting.poll()
    os._exit(EXIT_UNHEARD)


def main() -> None:
    """Answer the request in argv; ends without the runtimes' own farewell, which may crash."""
    descriptor = os.dup(1)  # the protocol's; what prints on stdout reaches stderr from here on
    os.dup2(2, 1)
    threading.Thread(target=end_when_unheard, args=(descriptor,), daemon=True).start()
    os.environ.update(NOISE)
    event: Event = {"event": "hello", "protocol": PROTOCOL}
    with os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) as protocol:
        print(json.dumps(event), file=protocol)
        for event in answer(sys.argv[1] if len(sys.argv) > 1 else ""):
            print(json.dumps(event), file=protocol)
        sys.stdout.flush()  # what runtimes printed; _exit would lose it
        os._exit(EXIT_FAILED if event["event"] == "error" else 0)
