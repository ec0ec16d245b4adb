"""The host's process killed with -9 at random moments of `rankship bench` over SSH; the same command goes on.

RANKSHIP_HOST_KILLS=20 kills more often than the usual test, RANKSHIP_HOST_SEED draws other moments; the figures are
printed (`pytest -s`).
"""

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from make.recipes import write_untrained_recipe
from make.ssh_servers import SshServer
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_pipeline.cli import main
from rankship_targets.client.connect import open_transport
from rankship_targets.transport.protocol import run_checked

pytestmark = [pytest.mark.system, pytest.mark.slow]
KILLS = int(os.environ.get("RANKSHIP_HOST_KILLS", "3"))
SEED = int(os.environ.get("RANKSHIP_HOST_SEED", "20261125"))
ROUNDS, CASES = 4, 3  # dense, compressed and the canary


@dataclass
class Starts:
    """Every beginning of a measurement that the device ever wrote down, by its own mark, and the run's name."""

    folder: Path
    seen: dict[str, str] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Look again and again: each beginning stays for as long as its runtime takes to load, at least."""
        while not self.over.wait(0.02):
            for state in self.folder.glob("runs/*/state.json"):
                with suppress(OSError, IndexError):
                    self.seen[state.read_text().split('"born": "')[1][:16]] = state.parent.name


@pytest.fixture
def starts(tmp_path: Path) -> Iterator[Starts]:
    found = Starts(tmp_path / "board")
    watcher = threading.Thread(target=found.watch)
    watcher.start()
    yield found
    found.over.set()
    watcher.join()


@pytest.fixture
def command(tmp_path: Path, ssh_server: SshServer) -> list[str]:
    """Build a small model and give the command that measures it on a board over SSH."""
    write_untrained_recipe(tmp_path, "a")
    (tmp_path / "suite.toml").write_text(
        f'recipe = "tiny.toml"\nrounds = {ROUNDS}\nmin_samples = 20\nmin_duration_ms = 20\nmax_warmup_ms = 200\n'
    )
    device = ssh_server.device
    keys = {"transport": "ssh", "host": device.host, "user": device.user, "host_key": device.host_key}
    keys |= {"key_file": device.key_file, "python": sys.executable, "workdir": str(tmp_path / "board")}
    lines = [f'{key} = "{value}"' for key, value in keys.items()]
    (tmp_path / "devices.toml").write_text("\n".join(["[board]", *lines, f"port = {device.port}", ""]))
    (tmp_path / "devices.toml").chmod(0o600)
    store = ["--store", str(tmp_path / "store")]
    assert main(["build", str(tmp_path / "tiny.toml"), *store]) == 0
    flags = ["--on", "board", "--inventory", str(tmp_path / "devices.toml"), "--results", str(tmp_path / "results")]
    return [sys.executable, "-m", "rankship_pipeline.cli", "bench", str(tmp_path / "suite.toml"), *flags, *store]


def test_a_run_killed_at_random_moments_goes_on_and_repeats_no_trial(
    command: list[str], starts: Starts, tmp_path: Path, ssh_server: SshServer
) -> None:
    moments = random.Random(SEED)  # noqa: S311 - not for secrets
    began = time.monotonic()
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    whole_s = time.monotonic() - began
    kills, kept_at_kills = 0, []
    while kills < KILLS:
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                code = process.wait(timeout=moments.uniform(0, whole_s))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                kept_at_kills.append(sum(len(open_bundle(path.parent).trials) for path in find_bundles(tmp_path)))
            else:
                assert code == 0, (tmp_path / "log").read_text()
    last = subprocess.run(command, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    bundles = [open_bundle(path.parent) for path in find_bundles(tmp_path)]
    trials = sum(len(bundle.trials) for bundle in bundles)
    print(f"\n{kills} kills in {len(bundles)} runs: {len(starts.seen)} starts for {trials} trials; {kept_at_kills}")  # noqa: T201
    for bundle in bundles:
        assert bundle.finished
        cases = Counter((trial.round, trial.key) for trial in bundle.trials)
        assert (len(cases), set(cases.values())) == (ROUNDS * CASES, {1})
    assert trials <= len(starts.seen) <= trials + kills, "at most one trial is begun again for each kill"
    assert not (tmp_path / "board/lease").exists()
    assert [*(tmp_path / "board").rglob("*.part"), *(tmp_path / "board/runs").iterdir()] == []
    assert [*(tmp_path / "results").rglob(".*.tmp"), *(tmp_path / "results").rglob(".pending.json")] == []
    with open_transport(ssh_server.device) as transport:
        assert "spool" not in run_checked(transport, ["sh", "-c", f"ps -eo args | grep -F '{tmp_path}' || true"])


def find_bundles(folder: Path) -> list[Path]:
    return list((folder / "results").glob("[!.]*/trials.jsonl"))
