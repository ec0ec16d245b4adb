"""One suite for every transport: what holds for one holds for all."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from make.transports import FLOOD, FLOOD_BYTES, NASTY_NAMES, Bench, assert_gone, needs_real, read_pids, run, write
from make.waiting import wait_until
from rankship_pipeline.foundation.errors import (
    CommandFailed,
    NoSpace,
    TargetTimeout,
)
from rankship_targets.transport.copying import copy_verified
from rankship_targets.transport.fake import FakeTransport
from rankship_targets.transport.local import LocalTransport
from rankship_targets.transport.protocol import Completed
from rankship_targets.transport.receiving import receive

# Commands


def test_success_and_failure_come_back_as_codes(bench: Bench) -> None:
    assert run(bench, "true").code == 0
    assert run(bench, "false").code == 1
    assert run(bench, "sh", "-c", "exit 7").code == 7


def test_unknown_program_is_code_127(bench: Bench) -> None:
    done = run(bench, "no-such-program-anywhere")
    assert done.code == 127
    assert "no-such-program-anywhere" in done.stderr


def test_death_by_signal_is_128_and_the_signal(bench: Bench) -> None:
    assert run(bench, "sh", "-c", "kill -TERM $$").code == 143


def test_outputs_stay_apart(bench: Bench) -> None:
    done = run(bench, "sh", "-c", "echo out; echo err >&2")
    assert (done.code, done.stdout, done.stderr) == (0, "out\n", "err\n")


def test_stdin_is_empty(bench: Bench) -> None:
    assert run(bench, "sh", "-c", "cat; echo end").stdout == "end\n"


def test_megabytes_on_both_outputs_do_not_block(bench: Bench) -> None:
    done = run(bench, "sh", "-c", FLOOD, timeout_s=60)
    assert (done.code, len(done.stdout), len(done.stderr)) == (0, FLOOD_BYTES, FLOOD_BYTES)


@pytest.mark.parametrize("text", NASTY_NAMES)
def test_arguments_arrive_unchanged(bench: Bench, text: str) -> None:
    assert run(bench, "printf", "%s", text).stdout == text


def test_stream_gives_lines(bench: Bench) -> None:
    assert list(bench.transport.stream(["sh", "-c", "printf 'a\\n\\nb'"], timeout_s=30)) == ["a", "", "b"]
    assert list(bench.transport.stream(["true"], timeout_s=30)) == []


def test_stream_says_why_a_command_failed_after_its_lines(bench: Bench) -> None:
    lines = bench.transport.stream(["sh", "-c", "echo one; echo two; echo why >&2; exit 3"], timeout_s=30)
    assert [next(lines), next(lines)] == ["one", "two"]
    with pytest.raises(CommandFailed, match="status 3: why"):
        next(lines)


def test_stream_of_an_unknown_program_fails(bench: Bench) -> None:
    with pytest.raises(CommandFailed, match="127"):
        list(bench.transport.stream(["no-such-program-anywhere"], timeout_s=30))


def test_slow_command_times_out(bench: Bench) -> None:
    with pytest.raises(TargetTimeout, match="sleep"):
        run(bench, "sleep", "600", timeout_s=1)
    with pytest.raises(TargetTimeout, match="sleep"):
        list(bench.transport.stream(["sleep", "600"], timeout_s=1))
    assert run(bench, "true").code == 0


@needs_real  # the fake has no processes
def test_timed_out_command_is_ended_with_its_children(bench: Bench) -> None:
    script = 'echo $$ > "$1"; sleep 600 & echo $! >> "$1"; wait'
    with pytest.raises(TargetTimeout):
        run(bench, "sh", "-c", script, "sh", bench.place("pids"), timeout_s=2)
    assert_gone(bench)


@needs_real  # the fake has no processes
def test_left_stream_ends_its_command(bench: Bench) -> None:
    script = 'echo $$ > "$1"; echo ready; sleep 600 & echo $! >> "$1"; wait'
    lines = bench.transport.stream(["sh", "-c", script, "sh", bench.place("pids")], timeout_s=30)
    assert next(lines) == "ready"
    wait_until(lambda: len(read_pids(bench)) == 2)
    lines.close()
    assert_gone(bench)


# What only one of them can show


def test_full_disk_while_copying_is_no_space(tmp_path: Path) -> None:
    path, sha256 = write(tmp_path, b"x" * 100_000)
    with LocalTransport() as transport, pytest.raises(NoSpace, match="No space left"):
        receive(transport, path, "/dev/full", offset=0, sha256=sha256, place=str(tmp_path / "there"))
    with FakeTransport(capacity_bytes=10) as fake, pytest.raises(NoSpace, match="No space left"):
        receive(fake, path, "file.part", offset=0, sha256=sha256, place="file")


def test_fake_fails_on_demand() -> None:
    with FakeTransport() as fake:
        fake.fail_next(CommandFailed("first"), NoSpace("second"))
        with pytest.raises(CommandFailed, match="first"):
            fake.run(["true"], timeout_s=1)
        with pytest.raises(NoSpace, match="second"):
            fake.free_bytes(".")
        assert fake.run(["true"], timeout_s=1).code == 0


def test_relative_paths_start_at_the_home_folder(tmp_path: Path) -> None:
    path, sha256 = write(tmp_path)
    with LocalTransport(home=tmp_path) as transport:
        assert copy_verified(transport, path, "a/b", sha256)
        assert transport.run([sys.executable, "-c", "print(open('a/b').read())"], timeout_s=30).stdout == "content\n"


def test_program_that_may_not_run_is_code_126(tmp_path: Path) -> None:
    with LocalTransport() as transport:
        assert transport.run([str(tmp_path)], timeout_s=30).code == 126


def test_completed_is_a_frozen_record() -> None:
    done = Completed(code=0, stdout="", stderr="")
    assert replace(done, code=1).code == 1
