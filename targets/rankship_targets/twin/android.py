"""An Android-like root: mksh and toybox for aarch64 at Android's paths, and no C library that other programs can find.

The programs are Debian's. toybox's library and loader have paths that only toybox knows, so that a program linked
against glibc fails here as it does on a phone.
"""

import shutil
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError
from rankship_targets.twin import android_files
from rankship_targets.twin.binfmt import check_machine
from rankship_targets.twin.cache import find_or_make
from rankship_targets.twin.debian_root import run_tool, unpack_packages

STAND_IN = "the Pixel's stand-in"
QEMU = "qemu-aarch64-static"
_PACKAGES = ("toybox", "mksh")
_SHELL = "usr/lib/aarch64-linux-musl/bin/mksh"  # linked statically
_HIDDEN = "system/lib64/standins"
_LIBRARIES = {"libc.so.6": "libc.so.6", "libm.so.6": "libm.so.6", "libcrypt.so.1": "libcrypt.so.1"}
_LOADER = "ld-linux-aarch64.so.1"
# The hidden paths are exactly as long as the usual ones that they replace inside the programs.
_LOADER_PATHS = (b"/lib/ld-linux-aarch64.so.1\0", b"/system/lib64/standins/ld\0\0")
_SEARCH_PATHS = (b"/lib/aarch64-linux-gnu/", b"/system/lib64/standins/")
_FOLDERS = "system/bin system/etc vendor/bin product/bin apex data sdcard storage proc sys dev condition"
_LINKS = {"bin": "/system/bin", "etc": "/system/etc"}


def find_root() -> Path:
    """Return the root from the user's cache, or make it: some ten seconds and a few megabytes from the mirror."""
    sources = [Path(__file__), Path(android_files.__file__)]
    made_of = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    return find_or_make("pixel6", made_of, _make) / "root"


def _make(folder: Path) -> None:
    check_machine(STAND_IN)
    unpacked = folder / "unpacked"
    unpack_packages(unpacked, _PACKAGES)
    (folder / "root").mkdir()
    _build(unpacked, folder / "root")
    shutil.rmtree(unpacked)


def _build(unpacked: Path, root: Path) -> None:
    for name in _FOLDERS.split():
        (root / name).mkdir(parents=True)
    for name, target in _LINKS.items():
        (root / name).symlink_to(target)
    for name, text in android_files.SYSTEM_FILES.items():
        (root / name).write_text(text, encoding="utf-8")
    shutil.copyfile(unpacked / _SHELL, root / "system/bin/sh")
    _replace(unpacked / "bin/toybox", root / "system/bin/toybox", _LOADER_PATHS)
    (root / _HIDDEN).mkdir(parents=True)
    for source, name in _LIBRARIES.items():
        shutil.copyfile(unpacked / "lib/aarch64-linux-gnu" / source, root / _HIDDEN / name)
    _replace(unpacked / "lib" / _LOADER, root / _HIDDEN / "ld", _SEARCH_PATHS)
    for file in [*(root / "system/bin").iterdir(), root / _HIDDEN / "ld"]:
        file.chmod(0o755)
    for name in _list_tools(unpacked):
        link = root / "system/bin" / name
        if not link.exists():
            link.symlink_to("toybox")
    root.chmod(0o755)


def _replace(source: Path, target: Path, change: tuple[bytes, bytes]) -> None:
    """Copy a program and replace a path inside it by another of the same length."""
    old, new = change
    content = source.read_bytes()
    if old not in content or len(old) != len(new):
        raise InputError(f"{source.name} does not name {old!r}", hint="this version of the package is not supported")
    target.write_bytes(content.replace(old, new))


def _list_tools(unpacked: Path) -> list[str]:
    return run_tool([QEMU, "-L", unpacked, unpacked / "bin/toybox"], timeout_s=60).split()
