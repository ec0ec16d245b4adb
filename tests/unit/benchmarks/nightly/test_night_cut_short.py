"""Nights that are killed, interrupted or out of room: they go on, and measure nothing twice."""

import errno
import os
from pathlib import Path

import pytest

from make.bundles import start_bundle
from make.nights import (
    BUILD,
    QUIET,
    SMALL,
    do_night,
    keep_run,
    make_night_bundle,
    measure_with,
    plan_night,
)
from make.waiting import wait_until
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_benchmarks.fleet.measure import Measure
from rankship_benchmarks.nightly import judge as judge_night
from rankship_benchmarks.nightly.night import Tonight, run_night
from rankship_benchmarks.nightly.records import list_nights
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError

MOMENTS = ("build", "a", "b", "half of b", "b, not noted", "judge")


@pytest.mark.filterwarnings("ignore:.*fork")  # of Python from 3.12 on, and of JAX where an exporter brought it in
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_night_killed_at_any_moment_goes_on_and_measures_nothing_twice(tmp_path: Path, moment: str) -> None:
    tonight, calls = plan_night(tmp_path, "a,b"), tmp_path / "calls"

    def measure(device: str, _: Steps, *, kill: str = "") -> Path:
        if device == "b" and kill:  # so that a's run is noted first
            wait_until(lambda: any((known := night.find("a")) and known.run for night in list_nights(tmp_path)))
        if kill == device:
            os._exit(9)
        bundle = make_night_bundle(device, 1)
        if kill == f"half of {device}":
            start_bundle(tmp_path / "b-1", bundle.header, bundle.trials[0])
            os._exit(9)
        with calls.open("a") as stream:
            stream.write(device)
        folder = keep_run(tmp_path, bundle)
        if kill == f"{device}, not noted":
            os._exit(9)
        return folder

    kill_in_child(tonight, moment, lambda device, steps: measure(device, steps, kill=moment))
    night = do_night(tonight, measure)
    assert night.number == 1
    assert (night.exit_code, [one.gap for one in night.devices]) == (0, [None, None])
    assert sorted(calls.read_text()) == ["a", "b"]
    assert open_bundle(tmp_path / "b-1").finished
    assert open_bundle(tmp_path / "b-1").trials == make_night_bundle("b", 1).trials


def kill_in_child(tonight: Tonight, moment: str, measure: Measure) -> None:
    """Do the night in a process that dies, as by SIGKILL: nothing is flushed, no block is left in order."""
    child = os.fork()
    if child == 0:
        try:
            if moment == "judge":
                vars(judge_night)["open_bundle"] = lambda _: os._exit(9)
            run_night(tonight, lambda: os._exit(9) if moment == "build" else (BUILD, measure), QUIET)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_night_never_goes_on_with_another_nights_run_or_another_build(tmp_path: Path) -> None:
    tonight = plan_night(tmp_path, "a,b")
    old = make_night_bundle("a", 7)
    start_bundle(tmp_path / "a-7", old.header, old.trials[0])

    def interrupted(device: str, steps: Steps) -> Path:
        if device == "b":
            raise KeyboardInterrupt
        return measure_with(tmp_path)(device, steps)

    with pytest.raises(KeyboardInterrupt):
        do_night(tonight, interrupted)
    assert open_bundle(tmp_path / "a-7").finished
    other = do_night(tonight, build="another")
    assert other.number == 2
    first, _ = list_nights(tmp_path)
    assert (first.exit_code, str(first.devices[-1].gap)) == (130, "interrupted")


def test_a_full_disk_is_said_and_the_night_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tonight, written = plan_night(tmp_path), 0

    def full(_: int) -> None:
        nonlocal written
        written += 1
        if written > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "trials.jsonl")

    def measure(_: str, __: Steps) -> Path:
        return keep_run(tmp_path, make_night_bundle("a", 1))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left"):
            do_night(tonight, measure)
    half = len(open_bundle(tmp_path / "a-1").trials)
    assert 0 < half < len(SMALL.trials)
    night = do_night(tonight, measure)
    assert (night.number, night.exit_code) == (1, 0)
    assert open_bundle(tmp_path / "a-1").trials == make_night_bundle("a", 1).trials
