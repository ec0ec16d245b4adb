"""Racks on this machine: a real scheduler and hosts as processes, with devices that only pretend to measure.

A pretended device appends a line to `measured` for each trial that it takes, and holds each trial while a file `hold`
is in its spool, so that a test knows where it is.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from make import TESTS
from make.artifacts import describe_file, sign
from make.builds import make_build
from make.bundles import make_header
from make.trials import make_trial
from make.waiting import wait_until
from rankship_benchmarks.bundle.bundle import (
    append_trial,
    create_bundle,
    find_unfinished,
    finish_bundle,
    open_bundle,
    writing,
)
from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.rack.keys import Way, find_way, make_keys
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.devices.device import Device
from rankship_targets.twin.banner import find_free_port

PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from make.racks import serve; serve(*sys.argv[2:])"
HOME = "import sys; sys.path.insert(0, sys.argv[1]); from make.racks import measure; measure(*sys.argv[2:])"
QUIET = Steps(quiet=True)


def plan_run(folder: Path, recipe: str = "r", rounds: int = 3, file: bytes = b"weights") -> RunPlan:
    """What to measure: one signed file, in a store below `folder`; results go beside it."""
    model = folder / "store" / "artifact-1" / "model.onnx"
    if not model.exists():
        model.parent.mkdir(parents=True)
        model.write_bytes(file)
        sign(model)
    (folder / "results").mkdir(exist_ok=True)
    artifact = describe_file(model, file="artifact-1/model.onnx")
    build, suite = make_build(artifact, recipe=recipe), Suite(recipe="r.toml", rounds=rounds, canary=False)
    return RunPlan(build, [sign(model)], Store(folder / "store"), suite, folder / "results", ParityChoice())


def pretend(plan: RunPlan, device: Device, steps: Steps) -> Path:
    """Measure as `measure_build` does, without a device: an unfinished run goes on at its first missing round."""
    names = digest(plan.suite), digest(plan.build), device.name
    folder = find_unfinished(plan.results, *names)
    spool = plan.results.parents[2]
    if folder is None:
        run = f"{plan.build.recipe}-{device.name}-{os.urandom(4).hex()}"
        changes = {"run_id": run, "device": device.name, "rounds": plan.suite.rounds}
        folder = plan.results / run
        create_bundle(folder, make_header(plan.build, suite_sha256=names[0], build_sha256=names[1], **changes))
    with writing(folder):
        done = len(open_bundle(folder).trials)
        with steps.track("measure", plan.suite.rounds) as advance:
            for number in range(done, plan.suite.rounds):
                advance(f"round {number + 1}")
                append_trial(folder, make_trial(round=number, device=device.name))
                with (spool / "measured").open("a") as stream:
                    stream.write(f"{device.name} {plan.build.recipe} {number}\n")
                while (spool / "hold").exists():
                    time.sleep(0.02)
        finish_bundle(folder)
    return folder


def serve(address: str, keys: str, spool: str, devices: str) -> None:
    """Run a host of pretended devices; the process of a test's `start_host`."""
    from rankship_benchmarks.rack.host import Host
    from rankship_benchmarks.rack.serve import serve_devices

    way = find_way(address, Path(keys) if keys else None)
    named = {name: Device(name=name, transport="local") for name in devices.split(",")}

    def say(news: str) -> None:
        sys.stderr.write(f"{news}\n")

    host = Host(named, Path(spool), way.read_signers(), pretend, on_news=say, wait_s=1.0, asked_s=3.0)
    serve_devices(way, host, Path(spool) / "dask", say)


def measure(folder: str, address: str, keys: str, device: str) -> None:
    """Measure `plan_run(folder)` once; the process of a test's `start_home`."""
    from rankship_benchmarks.rack.home import open_rack

    with open_rack(find_way(address, Path(keys) if keys else None), look_s=0.3) as home:
        home.measure(plan_run(Path(folder)), device, QUIET)


@dataclass
class Running:
    """Programs of a rack that a test started; each has its log beside its name."""

    folder: Path
    keys: Path | None
    port: int = field(default_factory=find_free_port)
    address: str = "127.0.0.1"
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def way(self) -> Way:
        """The way to the scheduler."""
        return find_way(f"tcp://{self.address}:{self.port}", self.keys)

    def start_scheduler(self, *inside: str) -> None:
        """Start the scheduler at its port, and wait until it listens; `inside` goes before the command."""
        keys = ["--keys", str(self.keys)] if self.keys else []
        words = [sys.executable, "-m", "rankship_pipeline.cli", "scheduler", self.way.address, *keys]
        self._start("scheduler", [*inside, *words])
        wait_until(lambda: "scheduler at" in self.read_log("scheduler"), 300)

    def start_host(self, name: str, devices: Sequence[str], *inside: str) -> None:
        """Start a host with pretended devices, and wait until all are offered."""
        keys, spool = str(self.keys or ""), self.folder / name
        spool.mkdir(exist_ok=True)
        words = [sys.executable, "-c", PROGRAM, str(TESTS), self.way.address, keys, str(spool), ",".join(devices)]
        before = self.read_log(name).count(": offered to")
        self._start(name, [*inside, *words])
        wait_until(lambda: self.read_log(name).count(": offered to") - before >= len(devices), 300)

    def start_worker(self, name: str, inventory: Path, devices: Sequence[str]) -> None:
        """Start a host with the devices of an inventory, as a user of its own, and wait until all are offered."""
        spool = self.folder / name
        flags = ["--inventory", str(inventory), "--devices", ",".join(devices), "--spool", str(spool / "spool")]
        keys = ["--keys", str(self.keys)] if self.keys else []
        words = [
            sys.executable,
            "-m",
            "rankship_pipeline.cli",
            "worker",
            "--scheduler",
            self.way.address,
            *flags,
            *keys,
        ]
        self._start(name, ["env", f"XDG_CONFIG_HOME={spool}/config", f"XDG_STATE_HOME={spool}/state", *words])
        wait_until(lambda: self.read_log(name).count(": offered to") >= len(devices), 300)

    def start_home(self, device: str) -> subprocess.Popen[bytes]:
        """Start a process that measures `plan_run(folder)` on a device."""
        what = [str(self.folder), self.way.address, str(self.keys or ""), device]
        self.processes["home"] = subprocess.Popen([sys.executable, "-c", HOME, str(TESTS), *what])
        return self.processes["home"]

    def end(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End a program by its process id."""
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(300)

    def hold(self, host: str, *, on: bool) -> None:
        """Let a host's devices hold their trials, or go on."""
        mark = self.folder / host / "hold"
        mark.touch() if on else mark.unlink()

    def count_measured(self) -> Counter[str]:
        """How often each trial was taken, on all hosts together."""
        return Counter(line for path in self.folder.glob("*/measured") for line in path.read_text().splitlines())

    def read_log(self, name: str) -> str:
        """What a program said so far."""
        path = self.folder / f"{name}.log"
        text = path.read_text() if path.exists() else ""
        process = self.processes.get(name)
        assert process is None or process.poll() is None, text
        return text

    def _start(self, name: str, words: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(words, stdout=log, stderr=log)


@contextmanager
def running(folder: Path, *, with_keys: bool = True) -> Iterator[Running]:
    """A rack without any program yet; at the end all are ended."""
    keys = folder / "keys" if with_keys else None
    if keys:
        make_keys(keys)
    rack = Running(folder, keys)
    try:
        yield rack
    finally:
        for name in list(rack.processes):
            rack.end(name)
