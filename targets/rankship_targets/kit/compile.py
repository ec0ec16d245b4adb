"""The C++ program that runs ExecuTorch, built for a device from the libraries and headers in ExecuTorch's own wheel."""

import platform
import shutil
import subprocess
import tempfile
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

from rankship_pipeline.foundation.errors import BuildError
from rankship_targets.kit.system import Machine

PROGRAM = "rankship-executorch"
LIBRARIES = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_kernels_quantized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
    "executorch_etdump",
)
COMPILE_TIMEOUT_S = 900
_HEADERS = ("executorch/include/", "executorch/include/executorch/runtime/core/portable_type/c10/")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time a zip archive can hold


def build_runner(wheel: Path, machine: Machine, into: Path) -> None:
    """Compile the program into a folder, beside the libraries that it is linked with and loads at run time."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            kept = [name for name in archive.namelist() if name.startswith(_HEADERS[0])]
            archive.extractall(folder, kept)
            for library in LIBRARIES:
                (into / f"lib{library}.so").write_bytes(_read(archive, f"executorch/lib/lib{library}.so", wheel))
        headers = [word for header in _HEADERS for word in ("-isystem", f"{folder}/{header}")]
        version = wheel.name.split("-")[1]
        with as_file(files("rankship_targets") / "kit" / "executorch") as source:
            argv = [
                _find_compiler(machine), "-O2", "-std=c++17", "-pthread", "-Wall", "-Wextra",
                "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED",
                f'-DRANKSHIP_EXECUTORCH_VERSION="{version}"', *headers, str(source / "runner.cpp"),
                "-o", str(into / PROGRAM), f"-L{into}", "-Wl,--no-as-needed",
                *(f"-l{library}" for library in LIBRARIES), "-Wl,-rpath,$ORIGIN", "-s",
            ]  # fmt: skip
            done = subprocess.run(argv, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    if done.returncode != 0:
        message = f"the ExecuTorch runner does not compile against {wheel.name}: {done.stderr.strip()[-1500:]}"
        raise BuildError(message, hint="the runner is written for ExecuTorch 1.5")


def pack_runner(folder: Path, archive: Path) -> None:
    """Pack the built program and its libraries: the same files give the same bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.iterdir()):
            packed.writestr(zipfile.ZipInfo(path.name, _EPOCH), path.read_bytes(), zipfile.ZIP_DEFLATED)


def _find_compiler(machine: Machine) -> str:
    """Return this host's compiler for its own kind of machine, or Debian's cross compiler; BuildError without it."""
    name = "g++" if platform.machine() == machine else f"{machine.replace('_', '-')}-linux-gnu-g++"
    found = shutil.which(name)
    if found:
        return found
    package = "g++" if name == "g++" else f"g++-{machine.replace('_', '-')}-linux-gnu"
    message = f"this machine lacks {name}, which builds the ExecuTorch runner for {machine}"
    raise BuildError(message, hint=f"run `apt-get install {package}`, or use --formats onnx,tflite without ExecuTorch")


def _read(archive: zipfile.ZipFile, name: str, wheel: Path) -> bytes:
    try:
        return archive.read(name)
    except KeyError:
        raise BuildError(f"{wheel.name} has no {name}", hint="use ExecuTorch 1.5: its wheels contain it") from None
