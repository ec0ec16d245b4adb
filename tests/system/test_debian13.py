"""`make demo` and every test without a device on a fresh Debian 13, in a root of its packages, with Python 3.13."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = "trixie"
PACKAGES = "ca-certificates,make,python3"
# What the way to a package index is told by; the certificates that this machine trusts come along.
PASSED = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_TRUSTED_HOST",
    "PIP_DEFAULT_TIMEOUT",
    "http_proxy",
    "https_proxy",
)
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
ENTER = """
mount -t proc proc "$0/proc" && mount --rbind /sys "$0/sys" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"
"""
pytestmark = [pytest.mark.debian13, pytest.mark.slow]


class Machine:
    """A root with the sources in /rankship, entered with processes and mounts of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, command: str) -> None:
        kept = [f"{name}={os.environ[name]}" for name in PASSED if name in os.environ]
        inside = ["env", "-i", "HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", f"PIP_CERT=/{CERTIFICATES}", *kept]
        room = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, str(self.root)]
        done = subprocess.run(
            [*room, *inside, "sh", "-c", f"cd /rankship && {command}"], stdin=subprocess.DEVNULL, check=False
        )
        assert done.returncode == 0, f"{command} ended with status {done.returncode}; its own words are above"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    root = tmp_path_factory.mktemp("debian") / "root"
    make = ["mmdebstrap", "--quiet", "--mode=root", "--variant=apt", f"--include={PACKAGES}", SUITE, str(root)]
    subprocess.run(make, check=True)
    for name in (CERTIFICATES, "etc/resolv.conf", "etc/hosts"):
        shutil.copyfile(f"/{name}", root / name)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (root / "rankship" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / "rankship" / name)
    yield Machine(root)
    shutil.rmtree(root)


def test_the_demo_runs_there(machine: Machine) -> None:
    machine.run("make demo")
    assert list((machine.root / "rankship/rankship-results").glob("*/report.html"))


def test_what_needs_no_device_passes_there(machine: Machine) -> None:
    machine.run("make test-quick")
    machine.run(".venv/bin/python -m pytest -m 'slow and not twin and not system and not images and not debian13'")
