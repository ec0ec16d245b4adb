"""Detached runs as the agent holds them: real processes, their folders, and every way in which they end."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from make.devices import COLD, HOT, write_sensors
from make.onnx_files import save_product
from make.waiting import is_alive, wait_until
from rankship_targets.agent import main, runs, spool
from rankship_targets.agent.protocol import Fault
from rankship_targets.client.agent_file import find_agent

LIMIT_MC = 50_000


class Board:
    """A working folder, and a pretended device that is too warm to measure until `cool` is called."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.python, self.root, self.workdir = python, folder / "root", folder / "work"
        self.model, self.environment = folder / "model.onnx", dict(os.environ)
        self.environment["RANKSHIP_AGENT_ROOT"] = str(self.root)
        write_sensors(self.root, heat=HOT, boot_id="first")
        self.workdir.mkdir()
        save_product(self.model)

    def cool(self) -> None:
        """Let every run go on that waits for it, once it has said that it waits."""
        runs = [folder.name for folder in (self.workdir / "runs").glob("*/")]
        wait_until(lambda: all(self.waits(run) or not is_alive(self.state(run)["pid"]) for run in runs))
        write_sensors(self.root, heat=COLD)

    def waits(self, run: str) -> bool:
        events = self.folder(run) / "events.jsonl"
        return events.exists() and '"cooling"' in events.read_text()

    def ask(self, **request: object) -> list[dict[str, Any]]:
        """Have the agent answer, without its greeting."""
        process = self.start(**request)
        stdout, _ = process.communicate(timeout=120)
        hello, *events = map(json.loads, stdout.splitlines())
        assert hello == {"event": "hello", "protocol": 2}
        return events

    def start(self, **request: object) -> subprocess.Popen[str]:
        text = json.dumps({"workdir": str(self.workdir), **request})
        command = [self.python, str(find_agent()), text]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self.environment
        )

    def spool(self, run: str = "one", **changes: object) -> list[dict[str, Any]]:
        request = {
            "command": "measure",
            "format": "onnx",
            "artifact": str(self.model),
            "inputs": [str(self.model.with_name("x.npy"))],
            "threads": 1,
            "min_samples": 20,
            "min_duration_ms": 1,
            "max_warmup_ms": 2000,
            "cool_below_mc": LIMIT_MC,
            "max_cooling_ms": 600_000,
            **changes,
        }
        return self.ask(command="spool", run=run, request=request)

    def fetch(self, run: str = "one", offset: int = 0) -> list[dict[str, Any]]:
        return self.ask(command="fetch", run=run, offset=offset)

    def cancel(self, run: str = "one") -> None:
        assert self.ask(command="cancel", run=run) == [{"event": "done"}]

    def state(self, run: str = "one") -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder(run) / "state.json").read_text())
        return state

    def folder(self, run: str = "one") -> Path:
        return self.workdir / "runs" / run

    def kill(self, run: str = "one") -> None:
        os.kill(self.state(run)["pid"], signal.SIGKILL)
        wait_until(lambda: not is_alive(self.state(run)["pid"]))


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = Board(tmp_path)
    yield board
    write_sensors(board.root, boot_id="first")
    for folder in (board.workdir / "runs").glob("*"):
        board.cancel(folder.name)


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


WHOLE = ["cooling", "settled", "state", "opened", "loaded", "state", "warmed", "samples", "done"]


def test_a_run_goes_on_without_anyone_and_is_fetched_from_any_event(board: Board) -> None:
    assert names(board.spool()) == ["spooled", "done"]
    worker = psutil.Process(board.state()["pid"])
    assert os.getsid(worker.pid) == worker.pid != os.getsid(0)
    assert {Path(file.path).name for file in worker.open_files()} <= {"run.lock", "errors.txt", "events.jsonl"}
    board.cool()
    wait_until(lambda: not is_alive(worker.pid))
    events = board.fetch()
    assert names(events) == WHOLE
    assert len(events[-2]["ns"]) >= 20
    assert board.fetch(offset=5) == events[5:]
    assert board.fetch(offset=99) == []
    board.cancel()
    assert not list((board.workdir / "runs").iterdir())
    board.cancel()


def test_following_ends_with_the_run(board: Board) -> None:
    board.spool()
    following = board.start(command="fetch", run="one", offset=0)
    assert following.stdout is not None
    assert [json.loads(following.stdout.readline())["event"] for _ in range(2)] == ["hello", "cooling"]
    board.cool()
    rest, _ = following.communicate(timeout=60)
    assert names([json.loads(line) for line in rest.splitlines()]) == WHOLE[1:]
    assert following.returncode == 0


def test_a_follower_that_is_not_heard_ends_and_the_run_goes_on(board: Board) -> None:
    board.spool()
    following = board.start(command="fetch", run="one", offset=0)
    assert following.stdout is not None
    following.stdout.readline()
    following.stdout.close()
    assert following.wait(timeout=30) == main.EXIT_UNHEARD
    assert is_alive(board.state()["pid"])


def test_starting_a_run_again_finds_it_going_on_or_finished(board: Board) -> None:
    first = board.spool()
    assert board.spool() == first
    board.cool()
    assert names(board.fetch())[-1] == "done"
    wait_until(lambda: not is_alive(board.state()["pid"]))
    assert board.spool() == first


def test_a_run_name_stands_for_one_request(board: Board) -> None:
    board.spool()
    (event,) = board.spool(min_samples=21)
    assert event["kind"] == "bad_request"


def test_a_second_run_is_busy_until_the_first_has_ended(board: Board) -> None:
    board.spool()
    (event,) = board.spool("two")
    assert (event["kind"], event["message"]) == ("busy", "run one is going on")
    assert not board.folder("two").exists()
    board.cancel()
    assert names(board.spool("two")) == ["spooled", "done"]


def test_a_killed_run_has_died_and_is_begun_anew_when_asked(board: Board) -> None:
    (before, _) = board.spool()
    board.kill()
    *_, last = board.fetch()
    assert (last["event"], last["kind"]) == ("error", "agent_died")
    (again, _) = board.spool()
    assert again["born"] != before["born"]
    board.cool()
    assert names(board.fetch()) == WHOLE


def test_a_process_that_took_over_the_number_is_not_the_run(board: Board) -> None:
    board.spool()
    board.kill()
    bystander = subprocess.Popen(["sleep", "infinity"], start_new_session=True)
    try:
        (board.folder() / "state.json").write_text(json.dumps({**board.state(), "pid": bystander.pid}))
        assert board.fetch()[-1]["kind"] == "agent_died"
        board.cancel()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_cancel_ends_the_run_and_the_programs_it_left(board: Board) -> None:
    bystander = subprocess.Popen(["sleep", "infinity"])
    site = board.workdir / "site"
    site.mkdir()
    program = "import subprocess, pathlib, os\nchild = subprocess.Popen(['sleep', '60'])\n"
    program += f"pathlib.Path({str(site)!r}, 'part').write_text(str(child.pid))\n"
    program += f"os.rename({str(site / 'part')!r}, {str(site / 'child')!r})\nchild.wait()\n"
    (site / "onnxruntime.py").write_text(program)
    board.environment["PYTHONPATH"] = str(site)
    board.cool()
    board.spool()
    wait_until((site / "child").exists)
    child = int((site / "child").read_text())
    board.kill()
    assert is_alive(child)
    board.cancel()
    assert not is_alive(child)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_another_boot_is_told_unless_the_run_was_done(board: Board) -> None:
    board.spool()
    write_sensors(board.root, boot_id="second")
    assert board.fetch()[-1]["kind"] == "rebooted"
    write_sensors(board.root, boot_id="first")
    board.cool()
    events = board.fetch()
    write_sensors(board.root, boot_id="second")
    assert board.fetch() == events


def test_a_crash_of_the_runtime_is_its_own_failure(board: Board) -> None:
    (board.workdir / "onnxruntime.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    board.environment["PYTHONPATH"] = str(board.workdir)
    board.cool()
    board.spool()
    last = board.fetch()[-1]
    assert (last["event"], last["kind"]) == ("error", "failed")
    assert "Segmentation fault" in last["message"]


def test_a_torn_line_is_not_given_out(board: Board) -> None:
    board.spool()
    following = board.start(command="fetch", run="one", offset=1)
    assert following.stdout is not None
    following.stdout.readline()
    events = board.folder() / "events.jsonl"
    with events.open("a") as stream:
        stream.write('{"event": "samples", "ns": [1, 2')
    assert select.select([following.stdout], [], [], 1.0)[0] == []
    with events.open("a") as stream:
        stream.write("3]}\n")
    assert json.loads(following.stdout.readline()) == {"event": "samples", "ns": [1, 23]}
    board.kill()
    following.communicate(timeout=60)


def test_what_a_power_cut_left_of_a_line_is_a_run_that_died(board: Board) -> None:
    (first, _) = board.spool()
    board.kill()
    with (board.folder() / "events.jsonl").open("ab") as stream:
        stream.write(b"\0\0\0\n" + b'{"event": "done"}\n')
    assert board.fetch()[-1]["kind"] == "agent_died"
    (again, _) = board.spool()
    assert first != again


def test_old_runs_are_removed_when_another_starts_and_new_ones_are_kept(board: Board) -> None:
    for name, age_s in (("old", spool.KEPT_S + 60), ("young", spool.KEPT_S - 60)):
        board.folder(name).mkdir(parents=True)
        then = time.time() - age_s
        os.utime(board.folder(name), (then, then))
    board.spool()
    assert sorted(path.name for path in (board.workdir / "runs").iterdir()) == ["one", "young"]


def test_a_full_disk_is_no_space_and_the_run_says_so(board: Board, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(small)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        board.workdir = small
        board.cool()
        assert names(board.spool(min_samples=60_000)) == ["spooled", "done"]
        last = board.fetch()[-1]
        assert (last["event"], last["kind"]) == ("error", "no_space")
        board.cancel()
        (small / "ballast").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_frsize))
        (refused,) = board.spool()
        assert refused["kind"] == "no_space"
        assert board.fetch()[-1]["kind"] == "unknown_run"
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.parametrize("run", ["", "..", ".hidden", "a/b", "-a\nb", "x" * 101, "a b"])
def test_a_run_must_have_a_plain_name(board: Board, run: str) -> None:
    for command in ({"command": "fetch", "offset": 0}, {"command": "cancel"}, {"command": "spool"}):
        request = {"request": {"command": "probe", "workdir": "."}} if command["command"] == "spool" else {}
        (event,) = board.ask(run=run, **command, **request)
        assert event["kind"] == "bad_request"


def test_only_work_can_be_detached(board: Board) -> None:
    nested = {"command": "cancel", "workdir": ".", "run": "x"}
    for request in (nested, {"command": "dance"}, {}, {"command": "probe"}):
        (event,) = board.ask(command="spool", run="one", request=request)
        assert event["kind"] == "bad_request"
    assert board.fetch()[-1]["kind"] == "unknown_run"


def test_an_old_interpreter_runs_the_agent(tmp_path: Path) -> None:
    old = next(iter(sorted(Path.home().glob(".pyenv/versions/3.9.*/bin/python3.9"))), None) or shutil.which("python3.9")
    if old is None:
        pytest.skip("no Python 3.9 here")
    board = Board(tmp_path, str(old))
    assert names(board.ask(command="probe")) == ["probe", "done"]
    board.spool()
    assert is_alive(board.state()["pid"])
    board.cool()
    assert board.fetch()[-1]["kind"] == "lacks_runtime"
    board.cancel()


# The readers


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
words = st.sampled_from(sorted({name for _, fields in main.COMMANDS.values() for name in fields.split()}))
requests = st.dictionaries(words | st.just("command"), json_values | st.sampled_from(sorted(main.COMMANDS)), max_size=9)


@given(st.text() | st.builds(json.dumps, json_values) | st.builds(json.dumps, requests))
def test_any_request_is_parsed_or_refused(text: str) -> None:
    with suppress(Fault):  # any other error fails the test
        command, request = main.parse_request(text)
        assert callable(command)
        for name in set(request) - {"command"}:
            assert request[name] is None or type(request[name]) is main.TYPES.get(name, str)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"command":' * 50_000, "9" * 5_000, "\ud800", '{"command": NaN}'])
def test_hostile_requests_are_refused(text: str) -> None:
    with pytest.raises(Fault, match="bad_request"):
        main.parse_request(text)


@given(st.lists(st.builds(lambda ns: {"event": "samples", "ns": ns}, st.lists(st.integers()))), st.data())
def test_cut_anywhere_a_spool_gives_only_whole_events(events: list[dict[str, Any]], data: st.DataObject) -> None:
    whole = "".join(json.dumps(event) + "\n" for event in events).encode()
    cut = data.draw(st.integers(0, len(whole)))
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path.cwd()  # noqa: S108 - thousands of small files
    place = folder / f"rankship-spool-{os.getpid()}"
    place.mkdir(exist_ok=True)
    try:
        (place / runs.EVENTS).write_bytes(whole[:cut])
        read, position = runs.read_events(str(place), 0)
        assert read == events[: whole[:cut].count(b"\n")]
        (place / runs.EVENTS).write_bytes(whole)
        rest, _ = runs.read_events(str(place), position)
        assert read + rest == events
    finally:
        shutil.rmtree(place)


@given(st.binary())
def test_any_stored_line_is_an_event_or_a_run_that_died(line: bytes) -> None:
    with suppress(Fault):
        assert isinstance(runs.parse_line(line)["event"], str)
