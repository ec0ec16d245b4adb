"""The command `profile`: the time of each operator, from the runtime's own profiler.

A profiler slows what it observes, so this is a separate pass and none of its figures is a latency. All profilers
report whole microseconds. The first inferences, which include set-up, are left out.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from .delegates import open_onnx_session
from .litert_profile import profile_litert
from .programs import Program, find_program, infer_with
from .protocol import Event, Fault, Request
from .runtimes import Arrays, find_runtime, open_runtime, pair
from .system import OWN_STATUS, read_kilobytes
from .timing import load_samples

WARM_UP = 10
NS_PER_US = 1000

Operators = list[tuple[str, str, list[int]]]  # in running order: name, kind, ns in each inference
Profiler = Callable[[Request, Arrays, str], tuple[Operators, list[int]]]


def profile(request: Request) -> Iterator[Event]:
    """Run the first sample `runs` times under the runtime's profiler; Fault lacks_runtime if it has none."""
    program = find_program(request["format"])
    if program is not None:
        yield from trace(program, request)
        return
    name, *_ = find_runtime(request["format"]) or ("",)
    profiler = PROFILERS.get(name)
    if profiler is None:
        raise Fault("lacks_runtime", f"the runtime for {request['format']} offers no profile here")
    _, reading = open_runtime(request["format"])
    yield {"event": "opened", "runtime": reading, "rss_bytes": read_kilobytes(OWN_STATUS, "VmRSS")}
    with tempfile.TemporaryDirectory(dir=os.path.dirname(request["artifact"])) as folder:  # noqa: PTH120 - a string
        operators, taken = profiler(request, next(load_samples(request["inputs"])), folder)
    rows = [{"name": name, "kind": kind, "ns": ns} for name, kind, ns in operators]
    yield {"event": "profiled", "operators": rows, "inference_ns": taken}
    yield {"event": "done"}


def trace(program: Program, request: Request) -> Iterator[Event]:
    """Run ExecuTorch's program with tracing and send its ETDump unread: only the host has the tools to read it."""
    import numpy as np

    with tempfile.TemporaryDirectory(dir=os.path.dirname(request["artifact"])) as folder:  # noqa: PTH120 - a string
        path_of = os.path.join(folder, "{}").format  # noqa: PTH118 - as above
        sample = next(load_samples(request["inputs"]))
        for position, array in enumerate(sample):
            np.save(path_of(f"{position}.npy"), np.repeat(array, WARM_UP + request["runs"], axis=0))
        inputs = [path_of(f"{position}.npy") for position in range(len(sample))]
        options = ["--etdump", path_of("etdump")]
        events = list(infer_with(program, {**request, "inputs": inputs, "output": path_of("output")}, options))
        yield from events[:-1]
        with open(path_of("etdump"), "rb") as stream:  # noqa: PTH123 - as in the agent's other modules
            yield {"event": "traced", "etdump": base64.b64encode(stream.read()).decode("ascii")}
    yield {"event": "done"}


def profile_onnxruntime(request: Request, sample: Arrays, folder: str) -> tuple[Operators, list[int]]:
    """Profile through a trace file with one event for each run of each node."""
    trace_file = os.path.join(folder, "trace")  # noqa: PTH118 - a string
    session = open_onnx_session(request["artifact"], request["threads"], trace=trace_file)
    feed = dict(pair([spec.name for spec in session.get_inputs()], sample))
    taken = time_runs(lambda: session.run(None, feed), request["runs"])
    with open(session.end_profiling(), encoding="utf-8") as stream:  # noqa: PTH123 - as in the agent's other modules
        events = json.load(stream)
    found: dict[str, tuple[str, list[int]]] = {}
    for event in events:
        node, is_run, _ = event["name"].partition("_kernel_time")
        if event.get("cat") == "Node" and is_run:
            found.setdefault(node, (event["args"]["op_name"], []))[1].append(event["dur"] * NS_PER_US)
    return [(node, kind, ns[WARM_UP:]) for node, (kind, ns) in found.items()], taken


def profile_executorch(request: Request, sample: Arrays, folder: str) -> tuple[Operators, list[int]]:
    """Profile through an ETDump: the operators inside XNNPACK's delegates, and those that no delegate runs."""
    import torch
    from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc
    from executorch.extension.pybindings import _C as binding  # noqa: N811 - a module

    torch.set_num_threads(request["threads"])
    binding._unsafe_reset_threadpool(request["threads"])  # noqa: SLF001 - there is no other way
    module = binding._load_for_executorch(request["artifact"], enable_etdump=True)  # noqa: SLF001 - as above
    feed = [torch.from_numpy(array) for array in sample]
    taken = time_runs(lambda: module.run_method("forward", feed), request["runs"])
    path = os.path.join(folder, "etdump")  # noqa: PTH118 - a string
    module.write_etdump_result_to_file(path)
    with open(path, "rb") as stream:  # noqa: PTH123 - as above
        dump = deserialize_from_etdump_flatcc(stream.read())
    return list_operators(dump, request["runs"]), taken


def list_operators(dump: Any, count: int) -> Operators:  # noqa: ANN401 - ExecuTorch's record
    """Return the operators of an ETDump's last inferences."""
    runs = [list(list_leaves(run)) for run in dump.run_data[-count:]]
    kinds = [kind for kind, _ in runs[0]]
    times = zip(*([ns for _, ns in run] for run in runs))  # noqa: B905 - Python 3.9 knows no strict
    return [(str(at), kind, list(ns)) for at, (kind, ns) in enumerate(zip(kinds, times))]  # noqa: B905


def list_leaves(run: Any) -> Iterator[tuple[str, int]]:  # noqa: ANN401 - ExecuTorch's record
    """Yield kind and ns of the events that compute something, not of those that enclose them."""
    for event in run.events or ():
        timed = event.profile_event
        if timed is None or not (timed.delegate_debug_id_str or (timed.name or "").startswith("native_call_")):
            continue
        kind = timed.delegate_debug_id_str or timed.name[len("native_call_") :]
        yield kind.partition(" #")[0], timed.end_time - timed.start_time


def time_runs(run: Callable[[], Any], count: int) -> list[int]:
    """Run the warm-up, then `count` inferences; returns the time of each of these under the profiler, in ns."""
    taken = []
    for _ in range(WARM_UP + count):
        before = time.perf_counter_ns()
        run()
        taken.append(time.perf_counter_ns() - before)
    return taken[WARM_UP:]


# The runtime's distribution → its profiler.
PROFILERS: dict[str, Profiler] = {
    "onnxruntime": profile_onnxruntime,
    "ai-edge-litert": lambda request, sample, _: profile_litert(request, sample, WARM_UP),
    "executorch": profile_executorch,
}
