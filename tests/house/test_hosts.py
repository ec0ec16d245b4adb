"""A host needs no Linux: only what makes this machine a device, or emulates one, is bound to it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "pipeline/rankship",
    "pipeline/rankship_pipeline",
    "targets/rankship_targets",
    "benchmarks/rankship_benchmarks",
)
# What runs on a device, is this machine as one, or emulates one.
DEVICES = ("rankship_targets/agent/", "rankship_targets/twin/", "rankship_targets/transport/local.py")
MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "crypt", "spwd"}
CALLS = {
    *("fork", "forkpty", "getegid", "geteuid", "getgid", "getuid", "getloadavg", "killpg", "mkfifo", "setsid"),
    *("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "readv", "preadv", "statvfs"),
    *("O_DIRECTORY", "O_NOFOLLOW", "O_DIRECT", "uname", "SIGKILL", "SIGALRM", "SIGHUP"),
}
FOLDERS = ("/proc", "/sys/", "/dev/", "/etc/")
# Reached on Linux alone, or with another way elsewhere.
ALLOWED = {
    ("rankship_benchmarks/study/effort.py", "/proc/self/clear_refs"): "says so where it is missing",
    ("rankship_benchmarks/study/effort.py", "/proc/self/status"): "after the above",
    ("rankship_pipeline/foundation/profile.py", "resource"): "samples alone tell elsewhere",
    ("rankship_pipeline/foundation/spare.py", "/sys/fs/cgroup/memory.max"): "no control groups elsewhere",
    ("rankship_pipeline/foundation/spare.py", "/sys/fs/cgroup/memory.current"): "as above",
    ("rankship_pipeline/foundation/spare.py", "/sys/fs/cgroup/memory.stat"): "as above",
    ("rankship_pipeline/foundation/spare.py", "/sys/fs/cgroup/memory/memory.stat"): "as above",
    ("rankship_pipeline/foundation/spare.py", "/sys/fs/cgroup/memory/memory.limit_in_bytes"): "as above",
    ("rankship_pipeline/foundation/spare.py", "/sys/fs/cgroup/memory/memory.usage_in_bytes"): "as above",
    ("rankship_targets/transport/lease.py", "/proc/self/ns/pid"): "no namespaces elsewhere",
    ("rankship_targets/kit/debian.py", "geteuid"): "Debian's packages are fetched by apt",
}


def list_sources() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to((ROOT / package).parent))
            if not name.startswith(DEVICES):
                yield name, path


def find_bound(tree: ast.AST) -> set[str]:
    """Every module, member and file named in a source that only Linux, or no Windows, has."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} & MODULES
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            found |= {node.attr} & CALLS if owner in {"os", "signal"} else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            found |= {node.value} if node.value.startswith(FOLDERS) else set()
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import fcntl", {"fcntl"}),
        ("def f():\n    from resource import getrusage", {"resource"}),
        ("import os\nos.sched_getaffinity(0)", {"sched_getaffinity"}),
        ("open('/proc/stat')", {"/proc/stat"}),
        ("import os, psutil\npsutil.getloadavg(), os.getpid(), 'see /proc'", set()),
    ],
)
def test_what_binds_to_linux_is_found(source: str, found: set[str]) -> None:
    assert find_bound(ast.parse(source)) == found


def test_hosts_need_nothing_that_only_linux_has() -> None:
    found = {(name, one) for name, path in list_sources() for one in find_bound(ast.parse(path.read_text()))}
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set(), "no longer needed"
