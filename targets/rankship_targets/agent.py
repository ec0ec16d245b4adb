"""The agent: one file of standard-library Python (3.9 or newer) that runs beside the runtime it drives, on the device.

`python agent.py '{"command": "probe" | "infer" | "measure", …}'` answers in JSON objects, one a line, on what was
stdout; everything that runtimes print goes to stderr. The last event is `done`, or `error` with status 1. Infer and
measure share all loading code: what was verified is what is measured. The agent ends when nobody listens any more.

The environment variable RANKSHIP_AGENT_ROOT puts another folder before /sys and /proc in what describes the device.
"""

from __future__ import annotations

import gc
import glob
import importlib
import importlib.metadata
import json
import os
import platform
import re
import select
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

PROTOCOL = 1
ROOT = os.environ.get("RANKSHIP_AGENT_ROOT", "")
# VmHWM there is this process's own peak; getrusage's ru_maxrss starts at the parent's, which exec inherits.
OWN_STATUS = "/proc/self/status"
NOISE = {"TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
WINDOW_SAMPLES, WINDOW_NS = 3, 20_000_000  # one look at the warm-up lasts until both are reached
# Of the last windows' medians: how many count, largest over smallest, first over last where they fall.
STEADY_WINDOWS, STEADY_SPREAD, STEADY_TREND = 3, 1.05, 1.02
EXIT_FAILED, EXIT_UNHEARD = 1, 3
SYSTEM = {"python": platform.python_version(), "machine": platform.machine(), "kernel": platform.release()}

Event = dict[str, Any]
Request = dict[str, Any]
Arrays = list[Any]  # of numpy


class Fault(Exception):
    """A kind (lacks_runtime, bad_artifact, bad_request, bad_input, failed) and a message for the host."""


class Loaded(NamedTuple):
    """A model ready to run; only `infer` is timed, between the runtime's own forms of inputs and outputs."""

    prepare: Callable[[Arrays], Any]  # one sample of each input
    infer: Callable[[Any], Any]
    unpack: Callable[[Any], Arrays]


Loader = Callable[[str, int], Loaded]
Opener = Callable[[], Loader]


def open_onnxruntime() -> Loader:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    def load(path: str, threads: int) -> Loaded:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [spec.name for spec in session.get_inputs()]
        return Loaded(lambda arrays: dict(pair(names, arrays)), lambda feed: session.run(None, feed), list)

    return load


def open_litert(module: str) -> Loader:
    """Any interpreter with TensorFlow Lite's Python interface; int64 inputs become int32, as exporters narrow them."""
    interpreter_class = importlib.import_module(module).Interpreter

    def load(path: str, threads: int) -> Loaded:
        interpreter = interpreter_class(model_path=path, num_threads=threads)
        interpreter.allocate_tensors()
        inputs = sort_by_position(interpreter.get_input_details())
        outputs = [detail["index"] for detail in sort_by_position(interpreter.get_output_details())]

        def prepare(arrays: Arrays) -> list[tuple[int, Any]]:
            return [(spec["index"], x.astype(spec["dtype"], casting="same_kind")) for spec, x in pair(inputs, arrays)]

        def infer(feed: list[tuple[int, Any]]) -> Arrays:
            for index, array in feed:
                interpreter.set_tensor(index, array)
            interpreter.invoke()
            return [interpreter.get_tensor(index) for index in outputs]

        return Loaded(prepare, infer, list)

    return load


def open_executorch() -> Loader:
    """ExecuTorch's binding itself: `executorch.runtime` would import the exporter and take four times as long.

    Delegates are set up at the first inference, not while loading.
    """
    import torch
    from executorch.extension.pybindings import _C as binding  # noqa: N811 - a module

    def load(path: str, threads: int) -> Loaded:
        torch.set_num_threads(threads)
        binding._unsafe_reset_threadpool(threads)  # noqa: SLF001 - there is no other way
        module = binding._load_for_executorch(path)  # noqa: SLF001 - as above
        inputs = range(module.method_meta("forward").num_inputs())  # a damaged file shows here first
        return Loaded(
            lambda arrays: [torch.from_numpy(array) for _, array in pair(inputs, arrays)],
            lambda feed: module.run_method("forward", feed),
            lambda outputs: [tensor.numpy() for tensor in outputs],
        )

    return load


# format → what may run it, best first: the distributions it needs (the first names it), and its opener.
RUNTIMES: dict[str, list[tuple[tuple[str, ...], Opener]]] = {
    "onnx": [(("onnxruntime",), open_onnxruntime)],
    "tflite": [
        (("ai-edge-litert",), lambda: open_litert("ai_edge_litert.interpreter")),
        (("tflite-runtime",), lambda: open_litert("tflite_runtime.interpreter")),
        (("tensorflow",), lambda: open_litert("tensorflow.lite")),
    ],
    "executorch": [(("executorch", "torch"), open_executorch)],
}


def find_runtime(artifact_format: str) -> tuple[str, str, Opener] | None:
    """Find name, version and opener of the best installed runtime, importing none."""
    for distributions, opener in RUNTIMES[artifact_format]:
        if all(find_version(name) for name in distributions):
            return distributions[0], str(find_version(distributions[0])), opener
    return None


def find_version(distribution: str) -> str | None:
    """Read an installed distribution's version from its metadata."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def open_runtime(artifact_format: str) -> tuple[Loader, Event]:
    """Import the format's runtime; also tells how it reads on this device."""
    found = find_runtime(artifact_format)
    if found is None:
        raise Fault("lacks_runtime", f"no runtime for {artifact_format} is installed")
    name, version, opener = found
    try:
        importlib.import_module("numpy")
        loader = opener()
    except ImportError as failure:
        raise Fault("lacks_runtime", f"{name} {version} cannot be imported: {failure}") from failure
    return loader, {"name": name, "version": version, **SYSTEM}


def load_artifact(loader: Loader, request: Request) -> Loaded:
    """Load the artifact; whatever the runtime says against it is bad_artifact."""
    try:
        return loader(request["artifact"], request["threads"])
    except Exception as failure:
        raise Fault("bad_artifact", f"{request['artifact']}: {type(failure).__name__}: {failure}") from failure


def pair(things: Any, arrays: Arrays) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401 - whatever has a length
    """Join the model's inputs with the arrays, which must be as many."""
    if len(things) != len(arrays):
        raise Fault("bad_input", f"the model takes {len(things)} inputs, {len(arrays)} were given")
    return zip(things, arrays)  # noqa: B905 - Python 3.9 knows no strict


def sort_by_position(details: list[Any]) -> list[Any]:
    """Sort tensors as the torch model had them: exporters write the position into names (args_1, output_0, :2)."""

    def position(detail: Event) -> int:
        found = re.search(r"(?:args_|output_|:)(\d+)", detail["name"])
        return int(found.group(1)) if found else len(details)

    return sorted(details, key=position)


def read_text(path: str) -> str:
    """Read a small file of /sys or /proc; empty where there is none."""
    try:
        with open(ROOT + path, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123 - as above
            return stream.read().strip("\0 \n")
    except OSError:
        return ""


def read_each(pattern: str) -> list[str]:
    """Read every readable file that matches, in order of the numbers in its name."""
    paths = [path[len(ROOT) :] for path in glob.glob(ROOT + pattern)]  # noqa: PTH207 - as above
    texts = [read_text(path) for path in sorted(paths, key=lambda path: [int(n) for n in re.findall(r"\d+", path)])]
    return [text for text in texts if text]


def read_kilobytes(path: str, name: str) -> int | None:
    """Read a line "name:  123 kB" of /proc, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", read_text(path), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def ask_psutil(question: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - whatever it answers
    """Ask psutil what the files do not tell; None without it, without an answer, or for a pretended device."""
    try:
        return None if ROOT else question(importlib.import_module("psutil")) or None
    except Exception:  # noqa: BLE001 - a second source must never end the run
        return None


def read_state() -> Event:
    """Read the device's condition now."""
    governors = read_each("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    clocks = [int(text) for text in read_each("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    clocks = clocks or ask_psutil(lambda ps: [round(one.current * 1000) for one in ps.cpu_freq(percpu=True)])
    zones = [int(text) for text in read_each("/sys/class/thermal/thermal_zone*/temp") if re.fullmatch(r"-?\d+", text)]
    sensors = (
        None if zones else ask_psutil(lambda ps: [one for part in ps.sensors_temperatures().values() for one in part])
    )
    zones = zones or [round(one.current * 1000) for one in sensors or []]
    load = read_text("/proc/loadavg").split(" ")[0]
    return {
        "governor": "+".join(sorted(set(governors))) or None,
        "frequency_khz": clocks or None,
        "temperature_mc": max(zones, default=None),
        "load_1m_milli": round(float(load) * 1000) if load else None,
        "available_memory_bytes": read_kilobytes("/proc/meminfo", "MemAvailable")
        or ask_psutil(lambda ps: ps.virtual_memory().available),
    }


def probe(request: Request) -> Iterator[Event]:
    """Describe the device without importing any runtime."""
    disk = os.statvfs(request["workdir"])
    model = re.search(r"^model name\s*:\s*(.+)$", read_text("/proc/cpuinfo"), re.MULTILINE)
    found = {name: find_runtime(name) for name in RUNTIMES}
    yield {
        "event": "probe",
        **SYSTEM,
        "cpu_count": os.cpu_count() or 1,
        "cpu_model": read_text("/proc/device-tree/model") or (model.group(1) if model else None),
        "memory_bytes": read_kilobytes("/proc/meminfo", "MemTotal"),
        "free_bytes": disk.f_bavail * disk.f_frsize,
        "runtimes": {name: runtime[:2] if runtime else None for name, runtime in found.items()},
        "numpy": find_version("numpy"),
        "psutil": find_version("psutil"),
        "state": read_state(),
    }
    yield {"event": "done"}


def infer(request: Request) -> Iterator[Event]:
    """Run every sample once and keep the outputs, stacked on axis 0, in one .npy file per output."""
    loader, reading = open_runtime(request["format"])
    yield {"event": "opened", "runtime": reading, "rss_bytes": read_kilobytes(OWN_STATUS, "VmRSS")}
    model = load_artifact(loader, request)
    import numpy as np

    rows = [
        [np.array(output) for output in model.unpack(model.infer(model.prepare(sample)))]
        for sample in load_samples(request["inputs"])
    ]
    for position, outputs in enumerate(zip(*rows)):  # noqa: B905 - as above
        np.save(f"{request['output']}.{position}.npy", np.concatenate(outputs), allow_pickle=False)
    yield {"event": "done", "outputs": len(rows[0])}


def measure(request: Request) -> Iterator[Event]:
    """Time single inferences of the first sample, keeping every one."""
    yield {"event": "state", "when": "before", "state": read_state()}
    loader, reading = open_runtime(request["format"])
    yield {"event": "opened", "runtime": reading, "rss_bytes": read_kilobytes(OWN_STATUS, "VmRSS")}
    started = time.perf_counter_ns()
    model = load_artifact(loader, request)
    yield {"event": "loaded", "load_ns": time.perf_counter_ns() - started}
    feed = model.prepare(next(load_samples(request["inputs"])))
    gc.collect()
    gc.disable()
    warmup, steady = warm_up(model, feed, request["max_warmup_ms"] * 1_000_000)
    peak = read_kilobytes(OWN_STATUS, "VmHWM")  # more work in between would cool the caches
    taken = time_inferences(model, feed, request["min_samples"], request["min_duration_ms"] * 1_000_000)
    yield {"event": "state", "when": "after", "state": read_state()}
    yield {"event": "warmed", "ns": warmup, "steady": steady, "peak_rss_bytes": peak}
    yield {"event": "samples", "ns": taken}
    yield {"event": "done"}


def load_samples(paths: list[str]) -> Iterator[Arrays]:
    """Copy one sample of every input after the other, batch dimension kept; all inputs must hold as many."""
    import numpy as np

    try:
        arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        (count,) = {len(array) for array in arrays} - {0}
    except Exception as failure:
        raise Fault("bad_input", f"{paths} must be .npy files of as many samples each: {failure}") from failure
    for row in range(count):
        yield [array[row : row + 1].copy() for array in arrays]


def time_inferences(model: Loaded, feed: Any, min_samples: int, min_duration_ns: int) -> list[int]:  # noqa: ANN401
    """Time single inferences until there are enough of them and enough time has passed."""
    clock, run, taken = time.perf_counter_ns, model.infer, []
    end = clock() + min_duration_ns
    while True:
        before = clock()
        run(feed)
        after = clock()
        taken.append(after - before)
        if after >= end and len(taken) >= min_samples:
            return taken


def warm_up(model: Loaded, feed: Any, budget_ns: int) -> tuple[list[int], bool]:  # noqa: ANN401
    """Run until the time per inference is steady; False where it was not when the budget was spent."""
    taken, medians, end = list[int](), list[float](), time.perf_counter_ns() + budget_ns
    while True:
        window = time_inferences(model, feed, WINDOW_SAMPLES, WINDOW_NS)
        taken += window
        medians.append(statistics.median(window))
        if is_steady(medians) or time.perf_counter_ns() >= end:
            return taken, is_steady(medians)


def is_steady(medians: list[float]) -> bool:
    """Tell whether the last three windows lie close together and are not still falling."""
    last = medians[-STEADY_WINDOWS:]
    falling = last == sorted(last, reverse=True) and last[0] > last[-1] * STEADY_TREND
    return len(last) == STEADY_WINDOWS and max(last) <= min(last) * STEADY_SPREAD and not falling


Command = Callable[[Request], Iterator[Event]]
# command → its function and what a request must hold.
COMMANDS: dict[str, tuple[Command, str]] = {
    "probe": (probe, "workdir"),
    "infer": (infer, "format artifact inputs output threads"),
    "measure": (measure, "format artifact inputs threads min_samples min_duration_ms max_warmup_ms"),
}
INTEGERS = {"threads", "min_samples", "min_duration_ms", "max_warmup_ms"}
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


if __name__ == "__main__":
    main()
