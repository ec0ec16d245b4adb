"""The command `sweep`: several artifacts timed one after the other in one process, each as `measure` times one.

Starting a process and importing a runtime takes seconds on a small board. A sweep does both once for many small
artifacts, which are thus timed close enough together to be compared with each other.
"""

from __future__ import annotations

from collections.abc import Iterator

from .protocol import Event, Fault, Request
from .timing import measure

OWN = {"generation", "phase", "beside_bytes"}


def sweep(request: Request) -> Iterator[Event]:
    """Yield for each artifact the events of `measure`, which begin with the device's state before it.

    `own` has for each artifact what the request for it alone would say besides, of OWN.
    """
    artifacts, inputs = request["artifacts"], request["inputs"]
    all_own = request.get("own") or [{} for _ in artifacts]
    if not artifacts or len(artifacts) != len(inputs) or not all(type(paths) is list for paths in inputs):
        raise Fault("bad_request", f"each of {len(artifacts)} artifacts needs a list of inputs, got {len(inputs)}")
    if len(artifacts) != len(all_own) or any(type(one) is not dict or one.keys() - OWN for one in all_own):
        raise Fault("bad_request", f"own must be {len(artifacts)} tables of {', '.join(sorted(OWN))}, got {all_own}")
    for artifact, paths, own in zip(artifacts, inputs, all_own):  # noqa: B905 - Python 3.9 knows no strict
        for event in measure({**request, **own, "artifact": artifact, "inputs": paths}):
            if event["event"] != "done":
                yield event
    yield {"event": "done"}
