"""An arm64 Debian root with Python, OpenSSH and the runtimes, unpacked without configuring any package.

It has a user `pi`, a virtual environment /opt/rankship whose Python has the runtimes, and an empty folder BOARD for
the files that describe the board. Both stand-ins for a Raspberry Pi 4 use it.
"""

import compileall
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from rankship_pipeline.foundation.errors import InputError
from rankship_targets.twin.binfmt import PACKAGES as HOST_PACKAGES
from rankship_targets.twin.binfmt import check_machine
from rankship_targets.twin.board import THROTTLED
from rankship_targets.twin.cache import find_or_make, print_news

STAND_IN = "the Raspberry Pi's stand-in"
SUITE = "bookworm"
USER, USER_ID = "pi", 1000
PYTHON = "/opt/rankship/bin/python3"
PATH = "/opt/rankship/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BOARD = "/opt/board"
# The runtimes, in the versions that are tested together on the host, as wheels for Debian's Python.
WHEELS = {"ai-edge-litert": "2.3.0", "numpy": "2.4.6", "onnxruntime": "1.31.1", "psutil": "7.2.2"}
_PYTHON_VERSION = "3.11"
_GLIBC_MINORS = (34, 28, 27, 17)  # manylinux tags that Debian's glibc 2.36 satisfies, newest first
_DEBIAN = (
    "base-files",
    "base-passwd",
    "bash",
    "busybox-static",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "libc-bin",
    "libgomp1",
    "libstdc++6",
    "login",
    "mount",
    "ncurses-base",
    "openssh-server",
    "openssh-sftp-server",
    "passwd",
    "perl-base",
    "procps",
    "python3",
    "python3-pip",
    "python3-venv",
    "sed",
    "sudo",
    "tar",
    "util-linux",
    "zstd",
    "libnss-systemd-",
)
_SKIPPED = ("/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*")
_UNPACKING_S, _PIP_S = 1200, 900

_VCGENCMD = f"""#!/bin/sh
# What Raspberry Pi OS has under this name, as far as the board's files can answer.
case "$1" in
    get_throttled) echo "throttled=0x$(cat /{THROTTLED})" ;;
    measure_temp) t=$(cat /sys/class/thermal/thermal_zone0/temp); echo "temp=$((t / 1000)).$((t % 1000 / 100))'C" ;;
    *) echo 'error=1 error_msg="Command not registered"'; exit 1 ;;
esac
"""
_PERMITTED = "".join(f"{kind} sufficient pam_permit.so\n" for kind in ("auth", "account", "password", "session"))
_TEXTS = {
    "etc/hostname": "raspberrypi\n",
    "etc/hosts": "127.0.0.1\tlocalhost raspberrypi\n",
    "etc/sudoers.d/pi": f"{USER} ALL=(ALL) NOPASSWD: ALL\n",
    "etc/pam.d/sudo": _PERMITTED,
    "etc/pam.d/other": _PERMITTED,
    "opt/rankship/pyvenv.cfg": "home = /usr/bin\ninclude-system-site-packages = false\n",
    "home/pi/.profile": f"PATH={PATH}\n",
    "usr/bin/vcgencmd": _VCGENCMD,
    "usr/sbin/reboot": "#!/bin/sh\nexec busybox reboot -f\n",
    "usr/sbin/poweroff": "#!/bin/sh\nexec busybox poweroff -f\n",
}


def find_root() -> Path:
    """Return the folder with `root`, and in `keys` the private keys `host` and `user`; it is made if it is missing."""
    return find_or_make("debian", Path(__file__).read_text(encoding="utf-8"), _make)


def read_public_key(private: Path) -> str:
    """Read the public key beside a private key, "ssh-ed25519 AAAA…"."""
    return private.with_suffix(".pub").read_text(encoding="ascii").strip()


def run_tool(argv: Sequence[str | Path], *, timeout_s: float, environment: Mapping[str, str] | None = None) -> str:
    """Run a program of the host that must succeed; the error names the packages to install, or shows its output."""
    try:
        done = subprocess.run(
            [str(argument) for argument in argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **(environment or {})},
            check=False,
        )
    except FileNotFoundError:
        raise InputError(f"the stand-in needs {argv[0]}", hint=f"run `apt-get install {HOST_PACKAGES}`") from None
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{argv[0]} did not end within {timeout_s:g} s", hint="check the network and try again"
        ) from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-1500:]
        raise InputError(f"{argv[0]} ended with status {done.returncode}: {said}", hint="its own message is above")
    return done.stdout


def unpack_packages(root: Path, packages: Sequence[str]) -> None:
    """Fetch arm64 packages of the suite with their dependencies and unpack them; none of their programs is run."""
    options = ["--quiet", "--mode=root", "--architectures=arm64", "--variant=extract", "--skip=check/qemu"]
    options += ["--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"]
    options += [f"--dpkgopt=path-exclude={pattern}" for pattern in _SKIPPED]
    argv = ["mmdebstrap", *options, f"--include={','.join(packages)}", SUITE, str(root)]
    run_tool(argv, timeout_s=_UNPACKING_S, environment={"SOURCE_DATE_EPOCH": "0"})


def _make(folder: Path) -> None:
    check_machine(STAND_IN)
    root = folder / "root"
    print_news("unpacking Debian for arm64, once (about 30 s)")
    unpack_packages(root, _DEBIAN)
    _add_users(root)
    for name, text in _TEXTS.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755 if "bin/" in name else 0o440 if "sudoers" in name else 0o644)
    for name in ("proc", "sys", "dev", "run/sshd", "root", "tmp", "mnt", "var/log", "var/tmp", BOARD[1:]):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)
    for link, target in {"bin/sh": "dash", "usr/bin/awk": "busybox", PYTHON[1:]: "/usr/bin/python3"}.items():
        path = root / link
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path.exists() or path.is_symlink()):
            path.symlink_to(target)
    _make_keys(folder / "keys", root)
    print_news("fetching the runtimes' wheels for arm64, once (about 10 s)")
    _install_wheels(root)
    _compile(root)
    for name in ("home/pi", "home/pi/.profile", "home/pi/.ssh", "home/pi/.ssh/authorized_keys"):
        os.chown(root / name, USER_ID, USER_ID)


def _add_users(root: Path) -> None:
    """Write passwd, group and shadow, as the packages' own scripts would do."""
    masters = {name: (root / f"usr/share/base-passwd/{name}.master").read_text() for name in ("passwd", "group")}
    sshd = "sshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
    passwd = f"{masters['passwd']}{sshd}{USER}:x:{USER_ID}:{USER_ID}::/home/{USER}:/bin/bash\n"
    names = [line.partition(":")[0] for line in passwd.splitlines()]
    (root / "etc/passwd").write_text(passwd)
    (root / "etc/group").write_text(f"{masters['group']}{USER}:x:{USER_ID}:\n")
    shadow = root / "etc/shadow"
    shadow.write_text("".join(f"{name}:*:19000:0:99999:7:::\n" for name in names))
    shadow.chmod(0o640)


def _make_keys(keys: Path, root: Path) -> None:
    """Make new keys for the board and the user, and put each where the board looks for it."""
    keys.mkdir()
    for name in ("host", "user"):
        key = Ed25519PrivateKey.generate()
        private = keys / name
        private.touch(0o600)
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        private.with_suffix(".pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    settings = root / "etc/ssh"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "ssh_host_ed25519_key").touch(0o600)
    (settings / "ssh_host_ed25519_key").write_bytes((keys / "host").read_bytes())
    shutil.copy(root / "usr/share/openssh/sshd_config", settings / "sshd_config")
    for home in ("home/pi", "root"):
        folder = root / home / ".ssh"
        folder.mkdir(parents=True, mode=0o700)
        (folder / "authorized_keys").write_text(f"{read_public_key(keys / 'user')}\n")


def _install_wheels(root: Path) -> None:
    """Install the runtimes into the root's virtual environment; pip runs on the host."""
    site = root / f"opt/rankship/lib/python{_PYTHON_VERSION}/site-packages"
    tag = f"cp{_PYTHON_VERSION.replace('.', '')}"
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in _GLIBC_MINORS] + ["manylinux2014_aarch64"]
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), "--only-binary=:all:"]
    argv += [argument for platform in platforms for argument in ("--platform", platform)]
    argv += ["--implementation", "cp", "--python-version", _PYTHON_VERSION, "--no-compile"]
    argv += [argument for abi in (tag, "abi3", "none") for argument in ("--abi", abi)]
    run_tool([*argv, *(f"{name}=={version}" for name, version in WHEELS.items())], timeout_s=_PIP_S)


def _compile(root: Path) -> None:
    """Compile the Python sources: the user pi may not write beside them, so each start would compile them again.

    A host with another version of Python cannot do this; programs on its stand-in then start more slowly.
    """
    if f"{sys.version_info.major}.{sys.version_info.minor}" != _PYTHON_VERSION:
        return
    skipped = re.compile(r"/(tests?|idlelib|lib2to3|tkinter|pip|transformers|tools|quantization)/")
    for folder in (f"usr/lib/python{_PYTHON_VERSION}", "opt/rankship/lib"):
        compileall.compile_dir(root / folder, stripdir=root, rx=skipped, quiet=2)
