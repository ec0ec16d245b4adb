# ruff: noqa: INP001 - a script, no package
"""Throughput of copying a file to a device, compared with the usual tools: scp and sftp, or adb push.

    python benchmarks/baselines/copy_throughput.py DEVICE --inventory devices.toml --out copy_throughput.json

Sends the same random bytes in every way in turn, each with its own connection; without DEVICE it starts an OpenSSH
server of its own on the loopback. A ratio is of two neighbours in one round; its interval holds the true median with at
least 95 % and assumes no distribution (the order statistics of rankship's own reports). "rankship" is a whole push:
free space checked, hash computed on the device, file renamed. `--tree` also times a tree of many files like a kit's,
copied once and pushed again unchanged.
"""

import argparse
import getpass
import itertools
import json
import os
import platform
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rankship_benchmarks.stats.estimates import median_interval
from rankship_pipeline.foundation.files import hash_file
from rankship_targets.client.connect import open_transport
from rankship_targets.devices.device import Device, find_device
from rankship_targets.transport.adb.client import open_client
from rankship_targets.transport.copying import copy_many, copy_verified
from rankship_targets.transport.protocol import Transport
from rankship_targets.twin import ensure_running

MEBI = 1 << 20
TREE_FILES, TREE_BYTES = 1500, 57_000_000
SSHD = "/usr/sbin/sshd"
# Its sessions have an empty home: a dot file that starts a tool would be timed with every command.
CONFIGURATION = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin yes
SetEnv HOME={folder}
Subsystem sftp internal-sftp
"""


@contextmanager
def start_server(folder: Path) -> Iterator[Device]:
    """Run an SSH server for this user on a free loopback port."""
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)  # noqa: S607
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    configuration = folder / "sshd_config"
    configuration.write_text(CONFIGURATION.format(port=port, folder=folder))
    server = subprocess.Popen([SSHD, "-D", "-f", str(configuration)], stdin=subprocess.DEVNULL)
    try:
        await_banner(port)
        yield Device(
            name="loopback",
            transport="ssh",
            host="127.0.0.1",
            port=port,
            user=getpass.getuser(),
            host_key=(folder / "host.pub").read_text().strip(),
            key_file=str(folder / "user"),
        )
    finally:
        server.terminate()
        server.wait()


def await_banner(port: int) -> None:
    """Wait until the server sends its banner."""
    for _ in range(100):
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as connection:
                if connection.recv(4) == b"SSH-":
                    return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"{SSHD} does not answer on port {port}")


def make_ways(device: Device, folder: Path, source: Path, target: str) -> dict[str, Callable[[], object]]:
    """Return every way to send the file; ours includes connecting, as the tools do."""
    sha256 = hash_file(source)
    numbers = itertools.count()

    def push() -> None:
        with open_transport(device) as transport:
            copy_verified(transport, source, f"{target}.{next(numbers)}", sha256)

    def call(*argv: str) -> Callable[[], object]:
        return lambda: subprocess.run(argv, check=True, capture_output=True)

    if device.transport == "adb":
        return {
            "rankship": push,
            "adb push": call(*open_client(device).argv("push", str(source), target)),
        }
    known = folder / "known_hosts"
    key = " ".join((device.host_key or "").split()[:2])
    known.write_text(f"[{device.host}]:{device.port} {key}\n{device.host} {key}\n")
    options = ["-q", "-P", str(device.port), "-o", f"UserKnownHostsFile={known}", "-o", "BatchMode=yes"]
    if device.key_file:
        options += ["-i", str(Path(device.key_file).expanduser())]
    batch = folder / "batch"
    batch.write_text(f'put "{source}" "{target}"\n')
    login = f"{device.user}@{device.host}"
    return {
        "rankship": push,
        "scp": call("scp", *options, str(source), f"{login}:{target}"),
        "sftp": call("sftp", *options, "-b", str(batch), login),
    }


def measure(ways: dict[str, Callable[[], object]], runs: int, size_bytes: int) -> dict[str, dict[str, object]]:
    """Time every way in turn, `runs` times, the first of each unrecorded."""
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            cpu, start = spend_cpu_s(), time.monotonic()
            way()
            wall = time.monotonic() - start
            if run:
                walls[name].append(wall)
                cpus[name].append(spend_cpu_s() - cpu)
                sys.stderr.write(f"{name:17} {size_bytes / wall / 1e6:7.1f} MB/s\n")
    return {
        name: {
            "mb_per_s_median": size_bytes / statistics.median(seconds) / 1e6,
            "mb_per_s_range": [size_bytes / max(seconds) / 1e6, size_bytes / min(seconds) / 1e6],
            "client_cpu_s_median": statistics.median(cpus[name]),
            "wall_s": seconds,
        }
        for name, seconds in walls.items()
    }


def compare_pairs(figures: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Return our throughput over each tool's, paired by round, with 95 % intervals."""
    ratios: dict[str, dict[str, object]] = {}
    for tool in sorted(figures.keys() - {"rankship"}):
        walls = zip(figures["rankship"]["wall_s"], figures[tool]["wall_s"], strict=True)  # type: ignore[call-overload]
        pairs = [theirs / own for own, theirs in walls]
        ratios[f"rankship over {tool}"] = {"median": statistics.median(pairs), "interval": median_interval(pairs)}
    return ratios


def time_tree(device: Device, folder: Path, runs: int) -> dict[str, object]:
    """Time a tree like a kit's, 1,500 files and 57 MB: copied for the first time, then pushed again unchanged."""
    draw = random.Random(0)  # noqa: S311 - sizes, no secrets
    weights = [draw.lognormvariate(0, 2) for _ in range(TREE_FILES)]
    sizes = [max(1, round(TREE_BYTES * weight / sum(weights))) for weight in weights]
    files = {}
    for number, size in enumerate(sizes):
        path = folder / "tree" / f"part{number % 60:02}" / f"file{number:04}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(size))
        files[str(path.relative_to(folder))] = (path, hash_file(path))
    with open_transport(device) as transport:
        place = make_folder(transport)
    found = {f"{place}/{name}": file for name, file in files.items()}
    try:
        walls = []
        for _ in range(runs + 1):
            start = time.monotonic()
            with open_transport(device) as transport:
                copied = copy_many(transport, found)
            walls.append(time.monotonic() - start)
            sys.stderr.write(f"tree: {len(copied)} files copied in {walls[-1]:.2f} s\n")
    finally:
        with open_transport(device) as transport:
            transport.run(["rm", "-rf", "--", place], timeout_s=60)
    again = walls[1:]
    return {
        "files": len(files),
        "bytes": sum(sizes),
        "first_s": walls[0],
        "again_s_median": statistics.median(again),
        "again_s_interval": median_interval(again),
        "again_s": again,
    }


def spend_cpu_s() -> float:
    """Return the CPU seconds of this process and of its ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    """Measure and write the figures with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("device", nargs="?", help="a device of the inventory; none: a server on the loopback")
    parser.add_argument("--inventory", type=Path)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tree", action="store_true", help="also time a tree of many files")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "random"
        source.write_bytes(os.urandom(chosen.mib * MEBI))
        with ExitStack() as stack:
            if chosen.device:
                device = find_device(chosen.device, chosen.inventory)
                device = ensure_running(device) if device.twin else device
            else:
                device = stack.enter_context(start_server(folder))
            figures = compare(device, folder, source, chosen.runs)
            tree = time_tree(device, folder, chosen.runs) if chosen.tree else None
    report = {
        "bytes": chosen.mib * MEBI,
        "runs": chosen.runs,
        "device": chosen.device or "loopback",
        "host": platform.platform(),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "ways": figures,
        "ratios": compare_pairs(figures),
        "tree": tree,
    }
    chosen.out.write_text(json.dumps(report, indent=2) + "\n")


def compare(device: Device, folder: Path, source: Path, runs: int) -> dict[str, dict[str, object]]:
    """Measure every way that this host has, into a folder on the device that is deleted afterwards."""
    with open_transport(device) as transport:
        place = make_folder(transport)
        try:
            ways = make_ways(device, folder, source, f"{place}/random")
            found = {
                name: way
                for name, way in ways.items()
                if name == "rankship" or shutil.which(name.split()[0].rstrip(","))
            }
            return measure(found, runs, source.stat().st_size)
        finally:
            transport.run(["rm", "-rf", "--", place], timeout_s=60)


def make_folder(transport: Transport) -> str:
    """Make a new folder on the device."""
    return transport.run(["mktemp", "-d"], timeout_s=60).stdout.strip()


if __name__ == "__main__":
    main()
