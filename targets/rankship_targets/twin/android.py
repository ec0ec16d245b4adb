"""An Android-like root: mksh and toybox for aarch64 at Android's places, and no C library that a program could find.

The programs are Debian's. toybox's library and loader are hidden where only it finds them, so that a program linked
against glibc fails here as it does on a phone.
"""

import hashlib
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from rankship_pipeline.errors import Lacks
from rankship_pipeline.files import publish_folder
from rankship_targets.device import user_folder
from rankship_targets.twin import android_files
from rankship_targets.twin.namespace import QEMU

FETCH_TIMEOUT_S = 600
_SUITE, _PACKAGES = "bookworm", "toybox,mksh"
_SHELL = "usr/lib/aarch64-linux-musl/bin/mksh"  # linked statically
_HIDDEN = "system/lib64/standins"
_LIBRARIES = {"libc.so.6": "libc.so.6", "libm.so.6": "libm.so.6", "libcrypt.so.1": "libcrypt.so.1"}
_LOADER = "ld-linux-aarch64.so.1"
# What names the hidden places takes exactly the room of what named the usual ones.
_LOADER_PATHS = (b"/lib/ld-linux-aarch64.so.1\0", b"/system/lib64/standins/ld\0\0")
_SEARCH_PATHS = (b"/lib/aarch64-linux-gnu/", b"/system/lib64/standins/")
_FOLDERS = "system/bin system/etc vendor/bin product/bin apex data sdcard storage proc sys dev condition"
_LINKS = {"bin": "/system/bin", "etc": "/system/etc"}


def ensure_root() -> Path:
    """Find the root in the user's cache, or make it: some ten seconds and a few megabytes from the package mirror."""
    sources = [Path(__file__), Path(android_files.__file__)]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    root = user_folder("XDG_CACHE_HOME", ".cache") / "rankship" / "twins" / f"pixel6-{key[:16]}"
    if not root.is_dir():
        with publish_folder(root) as folder, TemporaryDirectory(prefix="rankship-android-") as packages:
            _fetch(Path(packages))
            _build(Path(packages), folder)
    return root


def _fetch(into: Path) -> None:
    """Unpack the packages and what they need, without installing them anywhere."""
    if shutil.which("mmdebstrap") is None:
        raise Lacks("the Pixel's twin is made by mmdebstrap, which is missing", hint="apt-get install mmdebstrap")
    into.chmod(0o755)  # apt downloads as a user of its own
    command = ["mmdebstrap", "--quiet", "--mode=root", "--architectures=arm64", "--variant=extract"]
    command += ["--skip=check/qemu", f"--include={_PACKAGES}", _SUITE, str(into / "unpacked")]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        message = f"mmdebstrap did not end within {FETCH_TIMEOUT_S} s"
        raise Lacks(message, hint="see whether the package mirror answers: apt-get update") from None
    if done.returncode != 0:
        said = done.stderr.strip()[-1000:]
        raise Lacks(f"mmdebstrap could not fetch {_PACKAGES} for arm64: {said}", hint="it needs Debian's packages")


def _build(packages: Path, root: Path) -> None:
    unpacked = packages / "unpacked"
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
    """Copy a program with another path inside, of the same length."""
    old, new = change
    content = source.read_bytes()
    if old not in content or len(old) != len(new):
        raise Lacks(f"{source.name} does not name {old!r}", hint="this version of the package is not known here")
    target.write_bytes(content.replace(old, new))


def _list_tools(unpacked: Path) -> list[str]:
    command = [str(QEMU), "-L", str(unpacked), str(unpacked / "bin/toybox")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
