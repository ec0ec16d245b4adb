"""Nights that are throttled, worse, without a device: each says so, and none spoils another."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from make.artifacts import DENSE
from make.nights import QUIET, do_night, make_device_night, make_night, measure_with, plan_night, read_words, throttle
from rankship_benchmarks.fleet.measure import Measure
from rankship_benchmarks.index.index import INDEX_FILE, refresh_own_index
from rankship_benchmarks.nightly import records as nights_file
from rankship_benchmarks.nightly.histories import list_histories
from rankship_benchmarks.nightly.judge import state_exit
from rankship_benchmarks.nightly.night import run_night
from rankship_benchmarks.nightly.page import PAGE
from rankship_benchmarks.nightly.records import CaseVerdict, holding, list_nights
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BuildError, ConnectionLost, Quarantined
from rankship_targets.devices.device import Device
from rankship_targets.devices.quarantine import watching


def test_a_night_that_is_worse_exits_with_1_and_the_next_at_the_same_level_does_not(tmp_path: Path) -> None:
    tonight = plan_night(tmp_path)
    assert read_words(do_night(tonight)) == ["unknown"]
    assert (read_words(second := do_night(tonight)), second.exit_code) == (["same"], 0)
    third = do_night(tonight, measure_with(tmp_path, slower=1.05))
    assert (read_words(third), third.exit_code) == (["worse"], 1)
    (case,) = third.devices[0].cases
    assert case.ratio is not None
    assert 1.04 < case.ratio.value < 1.06
    assert "1 worse" in (tmp_path / PAGE).read_text()
    assert do_night(tonight, measure_with(tmp_path, slower=1.05)).exit_code == 0
    assert [night.number for night in list_nights(tmp_path)] == [1, 2, 3, 4]


def test_a_throttled_night_is_a_gap_and_the_next_is_compared_with_the_night_before_it(tmp_path: Path) -> None:
    tonight = plan_night(tmp_path)
    do_night(tonight)
    hot = do_night(tonight, measure_with(tmp_path, slower=1.4, spoil=throttle))
    assert (hot.exit_code, read_words(hot)) == (5, [])
    assert "throttled" in str(hot.devices[0].gap)
    assert read_words(do_night(tonight)) == ["same"]
    ((case, history),) = list_histories(refresh_own_index(tmp_path), list_nights(tmp_path)).items()
    assert (case.device, case.key) == ("a", DENSE)
    assert [bool(night.rounds_ns) for night in history] == [True, False, True]
    assert "throttled" in str(history[1].gap)


def test_a_device_that_fails_stops_no_other_and_is_a_gap_with_its_reason(tmp_path: Path) -> None:
    tonight, good = plan_night(tmp_path, "a,b,c"), measure_with(tmp_path)

    def measure(device: str, steps: Steps) -> Path:
        with watching(Device(name=device, transport="local")):
            if device == "b":
                raise ConnectionLost("cable out", hint="")
            if device == "c":
                raise BuildError("another file than was proven", hint="")
        return good(device, steps)

    night = do_night(tonight, measure)
    assert [one.error for one in night.devices] == [None, "ConnectionLost", "BuildError"]
    assert night.exit_code == 3
    for _ in range(2):
        do_night(tonight, measure)
    last = do_night(tonight, measure)  # three failures in a row: left alone until somebody looks
    assert last.find("b") is not None
    assert "is in quarantine" in str(last.devices[1].gap)
    assert [bool(one.run) for one in last.devices] == [True, False, False]
    page = (tmp_path / PAGE).read_text()
    assert "b: Quarantined: b is in quarantine" in page
    assert main(["index", "--results", str(tmp_path)]) == 0


def test_a_twin_stands_in_and_its_number_is_its_own(tmp_path: Path) -> None:
    tonight, good = plan_night(tmp_path, "a/b"), measure_with(tmp_path)

    def measure(device: str, steps: Steps) -> Path:
        if device == "a":
            raise ConnectionLost("cable out", hint="")
        return good(device, steps)

    night = do_night(tonight, measure)
    (one,) = night.devices
    assert (one.device, one.measured_on, one.losses) == ("a", "b", ("a: ConnectionLost: cable out",))
    histories = list_histories(refresh_own_index(tmp_path), [night])
    assert {case.device for case in histories} == {"b"}


def test_a_second_nightly_finds_the_first_at_work_and_does_nothing(tmp_path: Path) -> None:
    tonight = plan_night(tmp_path)
    inside, leave = threading.Event(), threading.Event()
    good = measure_with(tmp_path)

    def measure(device: str, steps: Steps) -> Path:
        inside.set()
        assert leave.wait(30)
        return good(device, steps)

    first = threading.Thread(target=do_night, args=(tonight, measure))
    first.start()
    assert inside.wait(30)
    assert run_night(tonight, lambda: pytest.fail("built although another is at work"), QUIET) is None
    leave.set()
    first.join()
    (night,) = list_nights(tmp_path)
    assert night.exit_code == 0
    with holding(tmp_path) as held:  # and its lock is gone with it
        assert held


def test_a_clock_that_is_set_back_changes_no_order_and_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tonight, now = plan_night(tmp_path), datetime(2026, 11, 25, 2, tzinfo=UTC)

    def set_clock(moment: datetime) -> None:
        clock = type("Clock", (datetime,), {"now": classmethod(lambda *_: moment)})
        monkeypatch.setattr(nights_file, "datetime", clock)

    for number, moment in enumerate((now, now + timedelta(days=1), now - timedelta(days=300))):
        set_clock(moment)
        night = do_night(tonight, measure_with(tmp_path, slower=1.05 if number == 2 else 1))
    assert (night.number, read_words(night)) == (3, ["worse"])
    (history,) = list_histories(refresh_own_index(tmp_path), list_nights(tmp_path)).values()
    assert [each.started_utc[:4] for each in history] == ["2026", "2026", "2026"]
    assert [each.run_id for each in history] == ["a-1", "a-2", "a-3"]


def test_a_deleted_index_and_a_damaged_run_change_no_verdict(tmp_path: Path) -> None:
    tonight = plan_night(tmp_path)
    do_night(tonight)
    do_night(tonight)
    (tmp_path / INDEX_FILE).unlink()
    (tmp_path / "a-2/trials.jsonl").write_text("{}\n")
    assert read_words(do_night(tonight)) == ["same"]  # with the first


def test_a_build_that_fails_is_a_night_on_record(tmp_path: Path) -> None:
    def fail() -> tuple[str, Measure]:
        raise BuildError("an operator is missing", hint="")

    with pytest.raises(BuildError):
        run_night(plan_night(tmp_path), fail, QUIET)
    (night,) = list_nights(tmp_path)
    assert (night.exit_code, night.failure) == (3, "an operator is missing")
    assert do_night(plan_night(tmp_path)).number == 2


@pytest.mark.parametrize(
    ("words", "error_names", "status"),
    [
        (["same", "better"], [None], 0),
        (["unknown"], [None], 0),
        (["worse"], ["ConnectionLost", "MeasurementError"], 1),
        ([], ["MeasurementError", "Quarantined"], 4),
        ([], ["Throttled"], 5),
        ([], ["ParityFailed", "TargetTimeout"], 3),
    ],
)
def test_the_exit_status_says_the_gravest_thing(words: list[str], error_names: list[str | None], status: int) -> None:
    cases = tuple(CaseVerdict(key=DENSE, verdict=word, reason="") for word in words)
    devices = [
        make_device_night(f"d{place}", error, cases if not place else ()) for place, error in enumerate(error_names)
    ]
    assert state_exit(make_night(1, devices)) == status


def test_a_quarantined_device_is_named_by_its_reason_only_once(tmp_path: Path) -> None:
    def measure(_: str, __: Steps) -> Path:
        raise Quarantined("a is in quarantine: it failed 3 times", hint="rankship doctor a")

    night = do_night(plan_night(tmp_path), measure)
    assert (night.exit_code, night.devices[0].gap) == (4, "Quarantined: a is in quarantine: it failed 3 times")
