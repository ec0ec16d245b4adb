"""Unpacks packages of another architecture from the host's Debian mirror into a folder; the host's dpkg is unused."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rankship_pipeline.foundation.errors import BuildError

TIMEOUT_S = 900
# Everything that apt writes goes below one private folder; the package sources and trusted signatures are those of the
# host's configuration.
_CONFIGURATION = """
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "{user}";
APT::Install-Recommends "false";
Acquire::Languages "none";
Debug::NoLocking "true";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Log "{folder}/log";
"""


def unpack_packages(names: Sequence[str], architecture: str, scratch: Path, root: Path) -> dict[str, str]:
    """Fetch packages with all dependencies and unpack them into `root`; returns name → version of each."""
    unpacker = find_program("dpkg-deb", "dpkg")
    for folder in ("state/lists/partial", "cache/archives/partial", "log"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "status").touch()
    user = "root" if os.geteuid() == 0 else "_apt"
    text = _CONFIGURATION.format(architecture=architecture, user=user, folder=scratch)
    (scratch / "apt.conf").write_text(text, encoding="utf-8")
    _call_apt(["update"], scratch, architecture)
    _call_apt(["install", "--download-only", "--yes", "--", *names], scratch, architecture)
    found = {}
    for package in sorted((scratch / "cache" / "archives").glob("*.deb")):
        done = subprocess.run([unpacker, "-x", str(package), str(root)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(
                f"{package.name} cannot be unpacked: {done.stderr.strip()}", hint="check the free disk space"
            )
        name, version, _ = package.name.split("_")
        found[name] = version.replace("%3a", ":")
    return found


def find_program(name: str, package: str) -> str:
    """Return the path of a program of the host; BuildError naming its Debian package if it is missing."""
    found = shutil.which(name)
    if found is None:
        hint = f"kits for phones are built on a Debian host: run `apt-get install {package}`"
        raise BuildError(f"this machine lacks {name}", hint=hint)
    return found


def _call_apt(words: Sequence[str], scratch: Path, architecture: str) -> None:
    environment = {**os.environ, "APT_CONFIG": str(scratch / "apt.conf"), "LC_ALL": "C"}
    argv = [find_program("apt-get", "apt"), "-q", *words]
    try:
        done = subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"apt-get {words[0]} did not end within {TIMEOUT_S} s"
        raise BuildError(message, hint="check whether the Debian mirror answers") from None
    if done.returncode != 0:
        message = f"apt-get {words[0]} for {architecture} failed: {done.stderr.strip()[-800:]}"
        hint = "a Debian mirror has arm64; on other systems, add one to /etc/apt/sources.list.d"
        raise BuildError(message, hint=hint)
