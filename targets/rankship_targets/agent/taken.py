"""The commands `delegates` and `inspect`: which delegates a runtime has here, and what one takes of a file."""

from __future__ import annotations

import collections
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from .delegates import CPU_PROVIDER, HERE, IN_PROGRAM, open_interpreter, open_onnx_session
from .programs import find_program
from .protocol import Event, Fault, Request
from .runtimes import LITERT_MODULES, find_runtime, load_artifact, open_runtime, pair
from .timing import load_samples

DELEGATE_NODE = "DELEGATE"  # what LiteRT adds for each partition, after the file's own nodes

Taken = tuple[int, int, dict[str, int]]  # partitions, operators in them, and how many of each kind are left


def list_delegates(request: Request) -> Iterator[Event]:
    """Report which delegates a format's runtime has here; imports it."""
    if find_program(request["format"]) is not None:
        known = IN_PROGRAM
    else:
        open_runtime(request["format"])
        known = HERE[request["format"]]()
    yield {"event": "delegates", "known": known}
    yield {"event": "done"}


def inspect(request: Request) -> Iterator[Event]:
    """Load a file as it is timed and report what its delegate takes; Fault lacks_runtime if the runtime cannot tell."""
    name, *_ = find_runtime(request["format"]) or ("",)
    look = INSPECTORS.get(name)
    if look is None:
        raise Fault("lacks_runtime", f"the runtime for {request['format']} does not say what a delegate takes")
    open_runtime(request["format"])
    partitions, operators, left = load_artifact(lambda *_: look(request), request)
    yield {"event": "taken", "partitions": partitions, "operators": operators, "left": left}
    yield {"event": "done"}


def inspect_onnxruntime(request: Request) -> Taken:
    """Run the first sample once under the profiler, which names each node's provider."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(request["artifact"])) as folder:  # noqa: PTH120 - a string
        trace = os.path.join(folder, "trace")  # noqa: PTH118 - as above
        session = open_onnx_session(request["artifact"], request["threads"], request.get("delegate"), trace)
        sample = next(load_samples(request["inputs"]))
        session.run(None, dict(pair([spec.name for spec in session.get_inputs()], sample)))
        with open(session.end_profiling(), encoding="utf-8") as stream:  # noqa: PTH123 - as in the other modules
            return count_nodes(json.load(stream))


def count_nodes(events: list[Event]) -> Taken:
    """Count the nodes of a trace by provider; a partition is a stretch of nodes of one that is not the CPU's."""
    partitions, operators, inside = 0, 0, False
    left = collections.Counter[str]()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        here = event["args"].get("provider", CPU_PROVIDER) != CPU_PROVIDER
        partitions += here and not inside
        operators += here
        inside = here
        if not here:
            left[event["args"]["op_name"]] += 1
    return partitions, operators, dict(left)


def inspect_litert(request: Request) -> Taken:
    """Read the interpreter's nodes: the file's own, then one for each partition that its delegate took."""
    module = LITERT_MODULES[(find_runtime(request["format"]) or ("",))[0]]
    interpreter = open_interpreter(module, request["artifact"], request["threads"], request.get("delegate"))
    interpreter.allocate_tensors()
    tell = getattr(interpreter, "_get_ops_details", None)  # private, but there is no other way
    if tell is None:
        raise Fault("lacks_runtime", f"{module} of this release does not tell its operators")
    return count_operators(tell())


def count_operators(nodes: list[Event]) -> Taken:
    """Count the operators inside partitions: those that make a partition's outputs of its inputs."""
    own = [node for node in nodes if node["op_name"] != DELEGATE_NODE]
    partitions = [node for node in nodes if node["op_name"] == DELEGATE_NODE]
    makers = {int(tensor): at for at, node in enumerate(own) for tensor in node["outputs"]}
    taken = set[int]()
    for partition in partitions:
        given, wanted = set(map(int, partition["inputs"])), list(map(int, partition["outputs"]))
        while wanted:
            at = makers.get(wanted.pop())
            if at is not None and at not in taken:
                taken.add(at)
                wanted += [int(tensor) for tensor in own[at]["inputs"] if int(tensor) not in given]
    left = collections.Counter(node["op_name"] for at, node in enumerate(own) if at not in taken)
    return len(partitions), len(taken), dict(left)


# The runtime's distribution → what asks it. ExecuTorch's files say it themselves, and the host reads them.
INSPECTORS: dict[str, Callable[[Request], Any]] = {
    "onnxruntime": inspect_onnxruntime,
    **dict.fromkeys(LITERT_MODULES, inspect_litert),
}
