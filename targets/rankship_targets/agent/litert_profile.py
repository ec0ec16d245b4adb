"""LiteRT's profiler, through the C interface in its wheel: the Python interface does not offer it.

Names, structures and constants are those of LiteRT 2.3; another release is refused, because a wrong structure would
give wrong figures. LiteRT's own summary is not used: it averages over all runs, and one pause distorts it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import time
from collections.abc import Callable
from typing import Any

from .protocol import Fault, Request
from .runtimes import find_version

Handle = ctypes.c_void_p
CPU, WRITE = 1, 1  # an accelerator, a lock's mode
PROFILING = b"enable_profiling = true"
KEEP = ctypes.CFUNCTYPE(None, Handle)(lambda _: None)  # a deleter that frees nothing: Python owns the text
ELEMENTS = {"float32": 1, "int32": 2, "uint8": 3, "int64": 4, "int8": 9}
RELEASE = "2.3."  # of ai-edge-litert, whose structures these are
OPERATOR_EVENTS = {2, 4, 8}  # TFLite's kinds: operator, operator in a delegate, operator that a delegate profiled
_NS_PER_US = 1000


class Layout(ctypes.Structure):
    """A tensor's shape as the library stores it: rank and flags, then sizes and strides."""

    _fields_ = [("rank", ctypes.c_uint32), ("sizes", ctypes.c_int32 * 8), ("strides", ctypes.c_uint32 * 8)]


class TensorType(ctypes.Structure):
    """An element type and a shape."""

    _fields_ = [("element", ctypes.c_int), ("layout", Layout)]


class Event(ctypes.Structure):
    """One event of the profiler: a name, its kind (see above), times in microseconds, memory, and an index."""

    _fields_ = [
        ("tag", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("taken_us", ctypes.c_uint64),
        ("memory", ctypes.c_uint64 * 6),
        ("index", ctypes.c_uint64),
        ("more", ctypes.c_uint64),
        ("source", ctypes.c_int),
    ]


class Library:
    """The shared library; a call that returns a status other than 0 raises Fault."""

    def __init__(self) -> None:
        folder = os.path.dirname(str(importlib.import_module("ai_edge_litert").__file__))  # noqa: PTH120 - a string
        self._library = ctypes.CDLL(os.path.join(folder, "libLiteRt.so"))  # noqa: PTH118 - as above

    def call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - whatever C takes
        """Call a function by its name, without the prefix."""
        status = getattr(self._library, f"LiteRt{name}")(*arguments)
        if status:
            raise Fault("failed", f"LiteRt{name} returned status {status}")

    def make(self, name: str, *arguments: Any) -> Handle:  # noqa: ANN401 - as above
        """Call a function that returns a handle through its last argument."""
        made = Handle()
        self.call(name, *arguments, ctypes.byref(made))
        return made


def profile_litert(
    request: Request, sample: list[Any], warm_up: int
) -> tuple[list[tuple[str, str, list[int]]], list[int]]:
    """Return every operator's name, kind and ns for each inference, and the ns of each whole inference."""
    version = find_version("ai-edge-litert")
    if version is None or not version.startswith(RELEASE):
        raise Fault("lacks_runtime", f"LiteRT's profile needs release {RELEASE}x, here is {version}")
    try:
        library = Library()
        environment = library.make("CreateEnvironment", 0, None)
        model = compile_model(library, environment, request["artifact"])
    except (OSError, AttributeError) as failure:
        raise Fault("lacks_runtime", f"this LiteRT offers no profile: {failure}") from failure
    run = bind(library, environment, model, sample, count_outputs(request["artifact"]))
    profiler = library.make("CompiledModelGetProfiler", model)
    runs: list[list[tuple[str, int]]] = []
    taken: list[int] = []
    for _ in range(warm_up + request["runs"]):
        library.call("ResetProfiler", profiler)
        library.call("StartProfiler", profiler)
        before = time.perf_counter_ns()
        run()
        taken.append(time.perf_counter_ns() - before)
        library.call("StopProfiler", profiler)
        runs.append(read_events(library, profiler))
    names = [name for name, _ in runs[0]]
    if not names or any([name for name, _ in one] != names for one in runs):
        raise Fault("failed", "LiteRT's profile does not name the same operators every time")
    return [(str(at), name, [one[at][1] for one in runs[warm_up:]]) for at, name in enumerate(names)], taken[warm_up:]


def read_events(library: Library, profiler: Handle) -> list[tuple[str, int]]:
    """Read name and ns of every operator that ran since the profiler was reset."""
    count = ctypes.c_int()
    library.call("GetNumProfilerEvents", profiler, ctypes.byref(count))
    events = (Event * count.value)()
    library.call("GetProfilerEvents", profiler, count, events)
    return [(one.tag.decode(), one.taken_us * _NS_PER_US) for one in events if one.kind in OPERATOR_EVENTS]


def compile_model(library: Library, environment: Handle, path: str) -> Handle:
    """Compile a model for the CPU with profiling enabled; runtime options are a text with a known name."""
    options = library.make("CreateOptions")
    library.call("SetOptionsHardwareAccelerators", options, CPU)
    profiling = library.make("CreateOpaqueOptions", b"runtime_options_string", PROFILING, KEEP)
    library.call("AddOpaqueOptions", options, profiling)
    return library.make(
        "CreateCompiledModel", environment, library.make("CreateModelFromFile", environment, path.encode()), options
    )


def count_outputs(path: str) -> int:
    """Return how many outputs a model has, from the Python interface."""
    return len(importlib.import_module("ai_edge_litert.interpreter").Interpreter(model_path=path).get_output_details())


def bind(library: Library, environment: Handle, model: Handle, sample: list[Any], outputs: int) -> Callable[[], None]:
    """Make the buffers and fill the inputs, in the model's own order; returns a function that runs one inference."""
    first, count = ctypes.c_size_t(0), ctypes.c_size_t
    buffers_in, buffers_out = [], []
    for at, array in enumerate(sample):
        layout = Layout()
        library.call("GetCompiledModelInputTensorLayout", model, first, count(at), ctypes.byref(layout))
        wanted = library.make("GetCompiledModelInputBufferRequirements", model, first, count(at))
        narrow = array.astype("int32") if array.dtype == "int64" else array  # as exporters narrow them
        kind = TensorType(ELEMENTS[str(narrow.dtype)], layout)
        buffer = library.make("CreateManagedTensorBufferFromRequirements", environment, ctypes.byref(kind), wanted)
        address = Handle()
        library.call("LockTensorBuffer", buffer, ctypes.byref(address), WRITE)
        ctypes.memmove(address, narrow.tobytes(), narrow.nbytes)
        library.call("UnlockTensorBuffer", buffer)
        buffers_in.append(buffer)
    layouts = (Layout * outputs)()
    library.call("GetCompiledModelOutputTensorLayouts", model, first, count(outputs), layouts, 0)
    for at in range(outputs):
        kind = TensorType(ELEMENTS["float32"], layouts[at])
        wanted = library.make("GetCompiledModelOutputBufferRequirements", model, first, count(at))
        buffers_out.append(
            library.make("CreateManagedTensorBufferFromRequirements", environment, ctypes.byref(kind), wanted)
        )
    given = (Handle * len(buffers_in))(*buffers_in)
    made = (Handle * outputs)(*buffers_out)
    return lambda: library.call("RunCompiledModel", model, first, count(len(buffers_in)), given, count(outputs), made)
