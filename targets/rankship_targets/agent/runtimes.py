"""Every runtime that the agent can drive: what it needs, how a file is loaded, how one sample is run."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

from .delegates import open_interpreter, open_onnx_session
from .protocol import Event, Fault, Request
from .system import SYSTEM

Arrays = list[Any]  # of numpy


class Loaded(NamedTuple):
    """A model ready to run; only `infer` is timed, on inputs and outputs in the runtime's own form."""

    prepare: Callable[[Arrays], Any]  # one sample of each input
    infer: Callable[[Any], Any]
    unpack: Callable[[Any], Arrays]
    make_ready: Callable[[Any], None] = lambda _: None  # what each inference needs done before it


Model = TypeVar("Model")
Loader = Callable[[str, int], Loaded]
Opener = Callable[["str | None"], Loader]  # of a delegate, None for what the runtime does by itself
LITERT_MODULES = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "tflite-runtime": "tflite_runtime.interpreter",
    "tensorflow": "tensorflow.lite",
}


def open_onnxruntime(delegate: str | None) -> Loader:
    """Open ONNX Runtime; inputs are bound before timing, because `run` would wrap them each time (4 µs)."""
    importlib.import_module("onnxruntime")

    def load(path: str, threads: int) -> Loaded:
        session = open_onnx_session(path, threads, delegate)
        names = [spec.name for spec in session.get_inputs()]
        outputs = [spec.name for spec in session.get_outputs()]

        def prepare(arrays: Arrays) -> tuple[Any, Arrays]:
            bound = session.io_binding()
            for name, array in pair(names, arrays):
                bound.bind_cpu_input(name, array)
            for name in outputs:
                bound.bind_output(name, "cpu")
            return bound, arrays  # every run reads their memory, so they are kept

        def infer(feed: tuple[Any, Arrays]) -> Any:  # noqa: ANN401 - onnxruntime's own
            session.run_with_iobinding(feed[0])
            return feed[0]

        return Loaded(prepare, infer, lambda bound: list(bound.copy_outputs_to_cpu()))

    return load


def open_litert(module: str, delegate: str | None) -> Loader:
    """Open an interpreter with TensorFlow Lite's Python interface; int64 inputs become int32, as exporters do it."""
    importlib.import_module(module)

    def load(path: str, threads: int) -> Loaded:
        interpreter = open_interpreter(module, path, threads, delegate)
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


def open_executorch(_: str | None) -> Loader:
    """Open ExecuTorch's C++ binding: `executorch.runtime` would import the exporter and take four times as long.

    A file is made for its delegate, which is set up at the first inference, not while loading.
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


# format → its runtimes, best first: the distributions that each needs (the first is its name), and its opener.
RUNTIMES: dict[str, list[tuple[tuple[str, ...], Opener]]] = {
    "onnx": [(("onnxruntime",), open_onnxruntime)],
    "tflite": [((name,), partial(open_litert, module)) for name, module in LITERT_MODULES.items()],
    "executorch": [(("executorch", "torch"), open_executorch)],
}


def find_runtime(artifact_format: str) -> tuple[str, str, Opener] | None:
    """Return name, version and opener of the best installed runtime, without importing any; None if there is none."""
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


def open_runtime(artifact_format: str, delegate: str | None = None) -> tuple[Loader, Event]:
    """Import the format's runtime; returns its loader, and its name and version on this device."""
    found = find_runtime(artifact_format)
    if found is None:
        raise Fault("lacks_runtime", f"no runtime for {artifact_format} is installed")
    name, version, opener = found
    try:
        importlib.import_module("numpy")
        loader = opener(delegate)
    except ImportError as failure:
        raise Fault("lacks_runtime", f"{name} {version} cannot be imported: {failure}") from failure
    return loader, {"name": name, "version": version, **SYSTEM, **identify(name)}


def identify(distribution: str) -> Event:
    """Say what kind of process runs the files, and which binaries: two builds of one version may differ."""
    libraries = [
        f"{path} {path.hash.value}"
        for path in importlib.metadata.files(distribution) or ()
        if path.hash and ".so" in path.suffixes
    ]
    binary = hashlib.sha256("\n".join(sorted(libraries)).encode()).hexdigest() if libraries else None
    tell = getattr(sys.modules.get(distribution), "get_build_info", None)  # only onnxruntime has it
    return {"process": "python", "binary_sha256": binary, "build": tell() if tell else None}


def load_artifact(loader: Callable[[str, int], Model], request: Request) -> Model:
    """Load the artifact; any error of the runtime becomes Fault bad_artifact."""
    try:
        return loader(request["artifact"], request["threads"])
    except Fault:
        raise
    except Exception as failure:
        raise Fault("bad_artifact", f"{request['artifact']}: {type(failure).__name__}: {failure}") from failure


def pair(things: Any, arrays: Arrays) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401 - whatever has a length
    """Pair the model's inputs with the arrays; Fault bad_input if their numbers differ."""
    if len(things) != len(arrays):
        raise Fault("bad_input", f"the model takes {len(things)} inputs, {len(arrays)} were given")
    return zip(things, arrays)  # noqa: B905 - Python 3.9 knows no strict


def sort_by_position(details: list[Any]) -> list[Any]:
    """Sort tensors in the torch model's order: exporters write the position into names (args_1, output_0, :2)."""

    def position(detail: Event) -> int:
        found = re.search(r"(?:args_|output_|:)(\d+)", detail["name"])
        return int(found.group(1)) if found else len(details)

    return sorted(details, key=position)
