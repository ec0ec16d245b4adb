"""How each runtime is asked for what computes a file, and which of it a runtime has here.

None leaves a runtime as it is by itself. What the runtime lacks is refused here: onnxruntime would compute on the
processor instead, with a warning that nobody reads.
"""

from __future__ import annotations

import importlib
from typing import Any

from .protocol import Fault

CPU_PROVIDER = "CPUExecutionProvider"
PROVIDERS = {"cpu": CPU_PROVIDER, "xnnpack": "XnnpackExecutionProvider", "nnapi": "NnapiExecutionProvider"}
# ExecuTorch's names of what a file may be lowered to; its own kernels are always there
BACKENDS = {"cpu": "XnnpackBackend", "vulkan": "VulkanBackend"}
PLAIN = "plain"  # a runtime's own kernels, without XNNPACK


def open_onnx_session(path: str, threads: int, delegate: str | None = None, trace: str | None = None) -> Any:  # noqa: ANN401
    """Open a file with onnxruntime; what a delegate does not take runs on the CPU. `trace` begins a profile's name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    if trace is not None:
        options.enable_profiling, options.profile_file_prefix = True, trace
    wanted: list[Any] = [CPU_PROVIDER]
    if delegate not in {None, "cpu"}:
        name = PROVIDERS.get(str(delegate), str(delegate))
        if name not in onnxruntime.get_available_providers():
            here = ", ".join(onnxruntime.get_available_providers())
            raise Fault("lacks_runtime", f"onnxruntime {onnxruntime.__version__} has no {name} here, only {here}")
        if delegate == "xnnpack":  # it has threads of its own, which the session's must not disturb by spinning
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            wanted.insert(0, (name, {"intra_op_num_threads": str(threads)}))
        else:
            wanted.insert(0, name)
    return onnxruntime.InferenceSession(path, options, providers=wanted)


def open_interpreter(module: str, path: str, threads: int, delegate: str | None = None) -> Any:  # noqa: ANN401
    """Open a file with TensorFlow Lite's Python interface: by itself with XNNPACK, "plain" with its own kernels."""
    library = importlib.import_module(module)
    if delegate is None:
        return library.Interpreter(model_path=path, num_threads=threads)
    if delegate != PLAIN:
        raise Fault("lacks_runtime", f"{module} has no {delegate} delegate: LiteRT's benchmark_model may")
    kinds = getattr(library, "OpResolverType", None) or library.experimental.OpResolverType
    own = kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    return library.Interpreter(model_path=path, num_threads=threads, experimental_op_resolver_type=own)


def find_providers() -> list[str]:
    """Return the delegates that the installed onnxruntime was built with."""
    import onnxruntime

    there = onnxruntime.get_available_providers()
    return [delegate for delegate, name in PROVIDERS.items() if name in there]


def find_backends() -> list[str]:
    """Return the delegates whose files the installed ExecuTorch runs."""
    from executorch.extension.pybindings import _C as binding  # noqa: N811 - a module

    there = binding._get_registered_backend_names()  # noqa: SLF001 - there is no other way
    return [PLAIN, *(delegate for delegate, name in BACKENDS.items() if name in there)]


# format → the delegates that its Python runtime has here
HERE = {"onnx": find_providers, "tflite": lambda: ["cpu", PLAIN], "executorch": find_backends}
# What the kit links its program for ExecuTorch with.
IN_PROGRAM = ["cpu", PLAIN]
