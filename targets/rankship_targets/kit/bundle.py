"""The kit for phones: one archive with loader, libraries, Python, runtimes and runner, which runs in any folder.

Android has no glibc, so everything is started through the bundle's own loader. It was tried on the emulated phone and
under qemu, and never on a real phone.
"""

import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.formats import Format
from rankship_targets.kit.compile import build_runner
from rankship_targets.kit.debian import find_program, unpack_packages
from rankship_targets.kit.lock import KitLock, describe_file
from rankship_targets.kit.system import Board, Phone
from rankship_targets.kit.wheels import download_executorch, download_wheels

ARCHIVE = "bundle.tar"
LOADER = "ld-linux-aarch64.so.1"
_ARCHITECTURE, _TRIPLET = "arm64", "aarch64-linux-gnu"
_PACKAGES = ("python3", "libstdc++6")
_LAUNCHERS = {"py.sh": "launch-phone.sh"}
_RUNNER_LAUNCHER = {"executorch.sh": "launch-phone-runner.sh"}
# What a measurement never imports, by its path in the standard library or in a package.
_UNUSED_LIBRARY = {
    "test", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "distutils", "pydoc_data", "lib-dynload",
    "venv", "wsgiref", "curses", "dbm", "sqlite3", "xmlrpc", "msilib", "__pycache__",
}  # fmt: skip
_UNUSED_EXTENSION = re.compile(
    r"_(ssl|hashlib|curses|curses_panel|dbm|gdbm|sqlite3|tkinter|test\w*|codecs_\w+|lzma|bz2|crypt|ctypes_test)\."
    r"|^(readline|audioop|nis|ossaudiodev|spwd|xx\w+)\."
)
_UNUSED_SITE = {
    "onnxruntime": {"quantization", "tools", "transformers", "datasets"},
    "ai_edge_litert": {
        "aot", "tools", "qualcomm_options", "libLiteRtWebGpuAccelerator.so", "_pywrap_litert_converter.so",
        "_pywrap_tfl_calibration.so", "_pywrap_tensorflow_lite_calibration_wrapper.so",
        "_pywrap_modify_model_interface.so", "pywrap_genai_ops.so",
    },
    "numpy": {"f2py", "distutils", "testing", "typing"},
}  # fmt: skip
Say = Callable[[str], None]


def build_bundle(phone: Phone, formats: Sequence[Format], folder: Path, say: Say) -> KitLock:
    """Make the bundle from Debian's packages, wheels and the runner, and pack it."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch, bundle = Path(temporary), Path(temporary) / "bundle"
        say("fetching Python and the C library from Debian arm64")
        root = scratch / "root"
        packages = unpack_packages(_PACKAGES, _ARCHITECTURE, scratch / "apt", root)
        board = _describe_root(root, packages)
        say(f"downloading wheels for {board}")
        (scratch / "wheels").mkdir()
        runtimes = download_wheels(board, formats, scratch / "wheels")
        _place_python(root, board, bundle)
        for wheel in sorted((scratch / "wheels").iterdir()):
            _place_wheel(wheel, bundle / "site")
        if "executorch" in formats:
            say("building the ExecuTorch runner for aarch64")
            wheel = download_executorch(phone.machine, scratch)
            build_runner(wheel, phone.machine, bundle / "executorch")
            runtimes["executorch"] = ("executorch", wheel.name.split("-")[1])
        _collect_libraries(root, bundle)
        launchers = {**_LAUNCHERS, **(_RUNNER_LAUNCHER if "executorch" in formats else {})}
        for name, source in launchers.items():
            launcher = bundle / name
            launcher.write_bytes((files("rankship_targets") / "kit" / source).read_bytes())
            launcher.chmod(0o755)
        say("packing the bundle")
        unpacked_bytes = _pack(bundle, folder / ARCHIVE)
    return KitLock(system=phone, runtimes=runtimes, files=(describe_file(folder / ARCHIVE, unpacked_bytes),))


def _describe_root(root: Path, packages: dict[str, str]) -> Board:
    """Return the system that the wheels must fit: the unpacked interpreter and C library."""
    minors = [int(path.name.removeprefix("python3.")) for path in root.glob("usr/bin/python3.[0-9]*")]
    glibc = re.match(r"(\d+)\.(\d+)", packages.get("libc6", ""))
    if len(minors) != 1 or glibc is None:
        message = f"Debian's packages contain Python 3.{minors} and libc6 {packages.get('libc6')}, expected one of each"
        raise BuildError(message, hint="check that the mirror is that of a Debian release")
    return Board(machine="aarch64", python=(3, minors[0]), glibc=(int(glibc[1]), int(glibc[2])))


def _place_python(root: Path, board: Board, bundle: Path) -> None:
    """Copy the interpreter, its library as one zip archive, and its extension modules beside it."""
    name = f"python3.{board.python[1]}"
    library, extensions = root / "usr/lib" / name, bundle / "py" / "lib-dynload"
    for folder in (bundle / "bin", bundle / "lib", extensions):
        folder.mkdir(parents=True)
    shutil.copy(root / "usr/bin" / name, bundle / "bin" / "python3")
    (bundle / "bin" / "python3").chmod(0o755)
    with zipfile.ZipFile(bundle / "py" / "library.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(library.rglob("*.py")):
            inside = path.relative_to(library)
            if not _UNUSED_LIBRARY & set(inside.parts) and not inside.parts[0].startswith("config-"):
                archive.writestr(zipfile.ZipInfo(str(inside)), path.read_bytes(), zipfile.ZIP_DEFLATED)
    for path in sorted(library.glob("lib-dynload/*.so")):
        if not _UNUSED_EXTENSION.search(path.name):
            shutil.copy(path, extensions / path.name)


def _place_wheel(wheel: Path, site: Path) -> None:
    """Unpack a wheel without what no measurement imports; the dist-info stays, for the versions."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            parts = Path(entry.filename).parts
            unused = _UNUSED_SITE.get(parts[0], set()) | {"tests", "__pycache__"}
            second_copy = parts[0] == "onnxruntime" and parts[-1].startswith("libonnxruntime.so")
            if unused & set(parts[1:]) or second_copy or parts[-1].endswith((".pyi", ".a", ".h", ".lib")):
                continue
            archive.extract(entry, site)


def _collect_libraries(root: Path, bundle: Path) -> None:
    """Copy the loader and every shared library that a file in the bundle needs, directly or through another."""
    _place_library(root, bundle, LOADER)
    (bundle / "lib" / LOADER).chmod(0o755)
    programs = [bundle / "bin" / "python3", *(bundle / "executorch").glob("*")]
    waiting = [*programs, *bundle.rglob("*.so"), *bundle.rglob("*.so.*")]
    seen = {path.name for path in waiting}
    while waiting:
        for name in _list_needed(waiting.pop()):
            if name not in seen and _place_library(root, bundle, name):
                waiting.append(bundle / "lib" / name)
            seen.add(name)


def _place_library(root: Path, bundle: Path, name: str) -> bool:
    """Copy one of Debian's libraries; False if Debian has none, because a wheel contains its own."""
    for folder in (f"lib/{_TRIPLET}", f"usr/lib/{_TRIPLET}", "lib"):
        path = root / folder / name
        if path.exists() or path.is_symlink():
            shutil.copy(_follow(root, path), bundle / "lib" / name)
            return True
    return False


def _follow(root: Path, path: Path) -> Path:
    """Resolve links inside the unpacked root: absolute ones would lead out of it."""
    while path.is_symlink():
        target = path.readlink()
        path = root / target.relative_to("/") if target.is_absolute() else path.parent / target
    return path


def _list_needed(path: Path) -> Iterable[str]:
    argv = [find_program("readelf", "binutils"), "-d", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout)


def _pack(bundle: Path, archive: Path) -> int:
    """Pack in a fixed order with fixed times and owners; returns the unpacked size in bytes."""

    def normalise(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
        return entry

    total = 0
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as packed:
        for path in sorted(bundle.rglob("*")):
            packed.add(path, str(path.relative_to(bundle)), recursive=False, filter=normalise)
            total += path.stat().st_size if path.is_file() else 0
    return total
