"""LiteRT's profiler, by way of the C interface in its wheel: the Python one does not offer it.

Its table is printed for people; one table of one inference each is asked for, so that a median can be taken. Names
of types and numbers are those of LiteRT 2.3; whatever does not answer as it did is a fault, not a figure.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import time
from collections.abc import Callable
from typing import Any

from .protocol import Fault, Request

Handle = ctypes.c_void_p
CPU, WRITE = 1, 1  # an accelerator, a lock's mode
PROFILING = b"enable_profiling = true"
KEEP = ctypes.CFUNCTYPE(None, Handle)(lambda _: None)  # the text is ours: nothing is freed
ELEMENTS = {"float32": 1, "int32": 2, "uint8": 3, "int64": 4, "int8": 9}
_ROW = re.compile(r"\s*(?:Delegate/)?(\S.*?)\s+[\d.]+\s+[\d.]+\s+([\d.]+)\s+[\d.]+%\s+[\d.]+%\s+[\d.]+\s+\d+\s+(\S.*)")
_NEXT_TABLE = "Top by Computation Time"
_NS_PER_MS = 1_000_000


class Layout(ctypes.Structure):
    """A tensor's shape as the library has it: rank and flags, then sizes and strides."""

    _fields_ = [("rank", ctypes.c_uint32), ("sizes", ctypes.c_int32 * 8), ("strides", ctypes.c_uint32 * 8)]


class TensorType(ctypes.Structure):
    """An element type and a shape."""

    _fields_ = [("element", ctypes.c_int), ("layout", Layout)]


class Library:
    """The shared library; every call that answers with anything but 0 is a Fault."""

    def __init__(self) -> None:
        folder = os.path.dirname(str(importlib.import_module("ai_edge_litert").__file__))  # noqa: PTH120 - a string
        self._library = ctypes.CDLL(os.path.join(folder, "libLiteRt.so"))  # noqa: PTH118 - as above

    def call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - whatever C takes
        """Call a function by its name."""
        status = getattr(self._library, f"LiteRt{name}")(*arguments)
        if status:
            raise Fault("failed", f"LiteRt{name} answered {status}")

    def make(self, name: str, *arguments: Any) -> Handle:  # noqa: ANN401 - as above
        """Call a function whose last argument receives a thing."""
        made = Handle()
        self.call(name, *arguments, ctypes.byref(made))
        return made


def profile_litert(
    request: Request, sample: list[Any], warm_up: int
) -> tuple[list[tuple[str, str, list[int]]], list[int]]:
    """Give name, kind and ns by inference of every operator, and what each inference took."""
    try:
        library = Library()
        environment = library.make("CreateEnvironment", 0, None)
        model = compile_model(library, environment, request["artifact"])
    except (OSError, AttributeError) as failure:
        raise Fault("lacks_runtime", f"this LiteRT offers no profile: {failure}") from failure
    run = bind(library, environment, model, sample, count_outputs(request["artifact"]))
    profiler = library.make("CompiledModelGetProfiler", model)
    tables: list[list[tuple[str, str, int]]] = []
    taken: list[int] = []
    for number in range(warm_up + request["runs"]):
        library.call("ResetProfiler", profiler)
        library.call("StartProfiler", profiler)
        before = time.perf_counter_ns()
        run()
        after = time.perf_counter_ns()
        library.call("StopProfiler", profiler)
        if number >= warm_up:
            taken.append(after - before)
            summary = ctypes.c_char_p()
            library.call("GetProfileSummary", profiler, model, ctypes.byref(summary))
            tables.append(read_table((summary.value or b"").decode()))
    rows = [[row[:2] for row in one] for one in tables]
    if not rows[0] or any(one != rows[0] for one in rows):
        raise Fault("failed", "LiteRT's profile is not the same table every time")
    return [(name, kind, [one[at][2] for one in tables]) for at, (name, kind) in enumerate(rows[0])], taken


def compile_model(library: Library, environment: Handle, path: str) -> Handle:
    """Load a model for the CPU with profiling asked for; options are text, known by a name."""
    options = library.make("CreateOptions")
    library.call("SetOptionsHardwareAccelerators", options, CPU)
    asked = library.make("CreateOpaqueOptions", b"runtime_options_string", PROFILING, KEEP)
    library.call("AddOpaqueOptions", options, asked)
    return library.make(
        "CreateCompiledModel", environment, library.make("CreateModelFromFile", environment, path.encode()), options
    )


def count_outputs(path: str) -> int:
    """Ask the Python interface how many outputs a model has."""
    return len(importlib.import_module("ai_edge_litert.interpreter").Interpreter(model_path=path).get_output_details())


def bind(library: Library, environment: Handle, model: Handle, sample: list[Any], outputs: int) -> Callable[[], None]:
    """Make the buffers and fill the inputs, each in the model's own order; gives what runs one inference."""
    first, count = ctypes.c_size_t(0), ctypes.c_size_t
    buffers_in, buffers_out = [], []
    for at, array in enumerate(sample):
        layout = Layout()
        library.call("GetCompiledModelInputTensorLayout", model, first, count(at), ctypes.byref(layout))
        wanted = library.make("GetCompiledModelInputBufferRequirements", model, first, count(at))
        narrow = array.astype("int32") if array.dtype == "int64" else array  # as exporters narrow them
        kind = TensorType(ELEMENTS[str(narrow.dtype)], layout)
        buffer = library.make("CreateManagedTensorBufferFromRequirements", environment, ctypes.byref(kind), wanted)
        place = Handle()
        library.call("LockTensorBuffer", buffer, ctypes.byref(place), WRITE)
        ctypes.memmove(place, narrow.tobytes(), narrow.nbytes)
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


def read_table(text: str) -> list[tuple[str, str, int]]:
    """Read name, kind and ns of every operator from the table in running order."""
    rows = (_ROW.fullmatch(line) for line in text.partition(_NEXT_TABLE)[0].splitlines())
    return [(row[3], row[1], round(float(row[2]) * _NS_PER_MS)) for row in rows if row]
