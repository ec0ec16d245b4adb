"""Nights that are cut short, throttled, worse, without a device: each says so, and none spoils another."""

import dataclasses
import errno
import os
import re
import runpy
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from onnx import TensorProto, helper

from rankship_benchmarks.bundle.bundle import Bundle, append_trial, create_bundle, finish_bundle, open_bundle, writing
from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.fleet.measure import Measure
from rankship_benchmarks.fleet.schedule import read_jobs
from rankship_benchmarks.index.index import INDEX_FILE, refresh_own_index
from rankship_benchmarks.measure import one_device as measuring
from rankship_benchmarks.nightly import judge as judge_night
from rankship_benchmarks.nightly import page as nightly_page
from rankship_benchmarks.nightly import records as nights_file
from rankship_benchmarks.nightly.histories import Case, list_histories
from rankship_benchmarks.nightly.judge import state_exit
from rankship_benchmarks.nightly.night import Tonight, run_night
from rankship_benchmarks.nightly.page import PAGE, render_page
from rankship_benchmarks.nightly.records import CaseVerdict, DeviceNight, NightRecord, holding, list_nights
from rankship_benchmarks.report.history_charts import draw_history
from rankship_benchmarks.stats.steps import Night
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BuildError, ConnectionLost, InputError, Quarantined
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import ArtifactKey, Build, Format, Variant, Verified
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.choices import ParityChoice
from rankship_targets.devices.device import Device
from rankship_targets.devices.quarantine import watching
from rankship_targets.session.manifest import sign_artifact

SAMPLE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "judge/test_summary.py"))
OUTLINE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "report/test_report.py"))
FULL: Bundle = SAMPLE["make_bundle"](rounds=9, layers=3, samples=11)
# One artifact is enough for most: the statistics have their own tests.
CASE = ArtifactKey(variant="dense", format="onnx")
SMALL = dataclasses.replace(FULL, trials=tuple(one for one in FULL.trials if one.key == CASE), finished=True)
BUILD = SMALL.header.build_sha256
QUIET = Steps(quiet=True)
Spoil = Callable[[Bundle], Bundle]


def make_bundle(device: str, number: int, *, slower: float = 1.0, spoil: Spoil = lambda one: one) -> Bundle:
    """One night of one device: the same model, other noise."""
    noise = np.random.default_rng([number, len(device)]).lognormal(0, 0.004, len(SMALL.trials))
    trials = tuple(
        dataclasses.replace(
            trial, device=device, samples_ns=tuple(int(slower * factor * 412_000 + 40 * place) for place in range(11))
        )
        for trial, factor in zip(SMALL.trials, noise, strict=True)
    )
    header = dataclasses.replace(SMALL.header, run_id=f"{device}-{number}", device=device)
    return spoil(dataclasses.replace(SMALL, header=header, trials=trials))


def keep(results: Path, bundle: Bundle) -> Path:
    """Write a run as measuring does, going on with what is there of it."""
    folder = results / bundle.header.run_id
    if not folder.exists():
        create_bundle(folder, bundle.header)
    with writing(folder):
        for trial in bundle.trials[len(open_bundle(folder).trials) :]:
            append_trial(folder, trial)
        finish_bundle(folder)
    return folder


def plan(results: Path, on: str = "a") -> Tonight:
    jobs = read_jobs(on)
    devices = {name: Device(name=name, transport="local") for job in jobs for name in job.devices}
    results.mkdir(exist_ok=True)
    return Tonight(results=results, suite=("tiny", "s"), recipe="digits-merge", jobs=jobs, devices=devices, pauses_s=())


def measure_with(results: Path, **changes: Any) -> Measure:  # noqa: ANN401 - what make_bundle takes
    def measure(device: Device, _: Steps) -> Path:
        return keep(results, make_bundle(device.name, 1 + len(list(results.glob(f"{device.name}-*"))), **changes))

    return measure


def do_night(tonight: Tonight, measure: Measure | None = None, build: str = BUILD) -> NightRecord:
    night = run_night(tonight, lambda: (build, measure or measure_with(tonight.results)), QUIET)
    assert night is not None
    return night


def throttle(bundle: Bundle) -> Bundle:
    hot = dataclasses.replace(bundle.trials[0].after, throttled_bits=0b100)
    return dataclasses.replace(bundle, trials=tuple(dataclasses.replace(one, after=hot) for one in bundle.trials))


def read_words(night: NightRecord) -> list[str]:
    return [case.verdict for one in night.devices for case in one.cases]


def test_a_night_that_is_worse_exits_with_1_and_the_next_at_the_same_level_does_not(tmp_path: Path) -> None:
    tonight = plan(tmp_path)
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
    tonight = plan(tmp_path)
    do_night(tonight)
    hot = do_night(tonight, measure_with(tmp_path, slower=1.4, spoil=throttle))
    assert (hot.exit_code, read_words(hot)) == (5, [])
    assert "throttled" in str(hot.devices[0].gap)
    assert read_words(do_night(tonight)) == ["same"]
    ((case, history),) = list_histories(refresh_own_index(tmp_path), list_nights(tmp_path)).items()
    assert (case.device, case.key) == ("a", CASE)
    assert [bool(night.rounds_ns) for night in history] == [True, False, True]
    assert "throttled" in str(history[1].gap)


def test_a_device_that_fails_stops_no_other_and_is_a_gap_with_its_reason(tmp_path: Path) -> None:
    tonight, good = plan(tmp_path, "a,b,c"), measure_with(tmp_path)

    def measure(device: Device, steps: Steps) -> Path:
        with watching(device):
            if device.name == "b":
                raise ConnectionLost("cable out", hint="")
            if device.name == "c":
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
    tonight, good = plan(tmp_path, "a/b"), measure_with(tmp_path)

    def measure(device: Device, steps: Steps) -> Path:
        if device.name == "a":
            raise ConnectionLost("cable out", hint="")
        return good(device, steps)

    night = do_night(tonight, measure)
    (one,) = night.devices
    assert (one.device, one.measured_on, one.losses) == ("a", "b", ("a: ConnectionLost: cable out",))
    histories = list_histories(refresh_own_index(tmp_path), [night])
    assert {case.device for case in histories} == {"b"}


def test_a_second_nightly_finds_the_first_at_work_and_does_nothing(tmp_path: Path) -> None:
    tonight = plan(tmp_path)
    inside, leave = threading.Event(), threading.Event()
    good = measure_with(tmp_path)

    def measure(device: Device, steps: Steps) -> Path:
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


MOMENTS = ("build", "a", "b", "half of b", "b, not noted", "judge")


@pytest.mark.filterwarnings("ignore:.*fork")  # of Python from 3.12 on, and of JAX where an exporter brought it in
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_night_killed_at_any_moment_goes_on_and_measures_nothing_twice(tmp_path: Path, moment: str) -> None:
    tonight, calls = plan(tmp_path, "a,b"), tmp_path / "calls"

    def measure(device: Device, _: Steps, *, kill: str = "") -> Path:
        if device.name == "b":  # so that a's run is noted first
            while kill and not any((known := night.find("a")) and known.run for night in list_nights(tmp_path)):
                threading.Event().wait(0.01)
        if kill == device.name:
            os._exit(9)
        bundle = make_bundle(device.name, 1)
        if kill == f"half of {device.name}":
            create_bundle(tmp_path / "b-1", bundle.header)
            with writing(tmp_path / "b-1"):
                append_trial(tmp_path / "b-1", bundle.trials[0])
            os._exit(9)
        with calls.open("a") as stream:
            stream.write(device.name)
        folder = keep(tmp_path, bundle)
        if kill == f"{device.name}, not noted":
            os._exit(9)
        return folder

    kill_in_child(tonight, moment, lambda device, steps: measure(device, steps, kill=moment))
    night = do_night(tonight, measure)
    assert night.number == 1
    assert (night.exit_code, [one.gap for one in night.devices]) == (0, [None, None])
    assert sorted(calls.read_text()) == ["a", "b"]
    assert open_bundle(tmp_path / "b-1").finished
    assert open_bundle(tmp_path / "b-1").trials == make_bundle("b", 1).trials


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
    tonight = plan(tmp_path, "a,b")
    old = make_bundle("a", 7)
    create_bundle(tmp_path / "a-7", old.header)
    with writing(tmp_path / "a-7"):
        append_trial(tmp_path / "a-7", old.trials[0])

    def interrupted(device: Device, steps: Steps) -> Path:
        if device.name == "b":
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
    tonight, written = plan(tmp_path), 0

    def full(_: int) -> None:
        nonlocal written
        written += 1
        if written > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "trials.jsonl")

    def measure(_: Device, __: Steps) -> Path:
        return keep(tmp_path, make_bundle("a", 1))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left"):
            do_night(tonight, measure)
    half = len(open_bundle(tmp_path / "a-1").trials)
    assert 0 < half < len(SMALL.trials)
    night = do_night(tonight, measure)
    assert (night.number, night.exit_code) == (1, 0)
    assert open_bundle(tmp_path / "a-1").trials == make_bundle("a", 1).trials


def test_a_clock_that_is_set_back_changes_no_order_and_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tonight, now = plan(tmp_path), datetime(2026, 11, 25, 2, tzinfo=UTC)

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
    tonight = plan(tmp_path)
    do_night(tonight)
    do_night(tonight)
    (tmp_path / INDEX_FILE).unlink()
    (tmp_path / "a-2/trials.jsonl").write_text("{}\n")
    assert read_words(do_night(tonight)) == ["same"]  # with the first


def test_a_build_that_fails_is_a_night_on_record(tmp_path: Path) -> None:
    def fail() -> tuple[str, Measure]:
        raise BuildError("an operator is missing", hint="")

    with pytest.raises(BuildError):
        run_night(plan(tmp_path), fail, QUIET)
    (night,) = list_nights(tmp_path)
    assert (night.exit_code, night.failure) == (3, "an operator is missing")
    assert do_night(plan(tmp_path)).number == 2


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
    cases = tuple(CaseVerdict(key=CASE, verdict=word, reason="") for word in words)
    devices = [tell(f"d{place}", error, cases if not place else ()) for place, error in enumerate(error_names)]
    assert state_exit(make_night(1, devices)) == status


def tell(device: str, error: str | None, cases: tuple[CaseVerdict, ...] = ()) -> DeviceNight:
    return DeviceNight(device=device, measured_on=device, run="r", gap=error, error=error, losses=(), cases=cases)


def make_night(number: int, devices: Sequence[DeviceNight]) -> NightRecord:
    return NightRecord(
        number=number,
        suite="tiny",
        suite_sha256="s",
        recipe="r",
        build_sha256="b",
        started_utc=f"2026-{1 + number // 28:02}-{1 + number % 28:02}T02:00:00+00:00",
        finished_utc=None,
        asked=tuple(one.device for one in devices),
        devices=tuple(devices),
        failure=None,
        exit_code=0,
    )


def test_the_page_of_a_large_lab_is_one_small_file_and_says_what_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nightly_page, "_MOST_BYTES", 70_000)  # so that few charts need be drawn
    names = [f"board <{place}>" for place in range(8)]
    nights = [make_night(number, [tell(name, None) for name in names]) for number in range(60)]
    random = np.random.default_rng(3)
    kinds: list[tuple[Format, Variant]] = [("onnx", "dense"), ("tflite", "compressed"), ("executorch", "dense")]
    histories = {
        Case(device=name, recipe="r", key=ArtifactKey(variant=variant, format=format_)): tuple(
            Night(
                run_id=str(night.number),
                started_utc=night.started_utc,
                rounds_ns=tuple(412_000 * random.lognormal(0, 0.01, 7)) if night.number != 9 else (),
                gap=None if night.number != 9 else "throttled",
            )
            for night in nights
        )
        for name in names
        for format_, variant in kinds
    }
    page = render_page(nights[-1], nights, histories)
    OUTLINE["read_outline"](page)
    assert len(page.encode()) < 70_000 + 100_000
    assert "Not drawn, to keep this page below 2 MB" in page
    assert "board &lt;0&gt;" in page
    assert "<board" not in page
    assert not re.search(r"@import|url\((?!#)|\bsrc=", page)
    assert "night does not count" in page


@pytest.mark.parametrize(
    ("moments", "names"),
    [
        (("2026-11-26T02:15", "2026-11-26T14:30"), ("02:15", "14:30", "in UTC on 2026-11-26")),
        (("2026-11-25T02:15", "2026-11-26T02:15"), ("11-25", "11-26", "month-day")),
        (("2026-11-26T02:15",), ("11-26", "month-day")),
    ],
)
def test_nights_of_one_day_are_told_apart_by_their_time(moments: tuple[str, ...], names: tuple[str, ...]) -> None:
    nights = [
        Night(run_id=moment, started_utc=f"{moment}:00+00:00", rounds_ns=(5e6, 5.1e6, 5.2e6)) for moment in moments
    ]
    svg = draw_history("chart", "dense", nights, ())
    assert [name for name in names if name not in svg] == []


def test_a_quarantined_device_is_named_by_its_reason_only_once(tmp_path: Path) -> None:
    def measure(_: Device, __: Steps) -> Path:
        raise Quarantined("a is in quarantine: it failed 3 times", hint="rankship doctor a")

    night = do_night(plan(tmp_path), measure)
    assert (night.exit_code, night.devices[0].gap) == (4, "Quarantined: a is in quarantine: it failed 3 times")


def make_tiny_build(folder: Path) -> tuple[Build, Verified]:
    """A signed ONNX file of one operator in a store, its build, and its input beside it."""
    folder.mkdir()
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [0.5] * 12)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 4), ("y", 3))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "tiny", [ends[0]], [ends[1]], [weights])
    model = folder / "tiny.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), model)
    np.save(folder / "x.npy", np.ones((1, 4), np.float32))
    artifact = dataclasses.replace(
        SMALL.header.build.artifacts[0], file=model.name, sha256=hash_file(model), recipe_sha256="r"
    )
    proof = dataclasses.replace(SMALL.header.verified[0], artifact_sha256=artifact.sha256)
    sign_artifact(model, proof, "r")
    return dataclasses.replace(SMALL.header.build, artifacts=(artifact,)), proof


@pytest.mark.slow
def test_real_devices_are_measured_at_once_and_one_that_is_away_is_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, proof = make_tiny_build(tmp_path / "store")
    monkeypatch.setattr(measuring, "find_inputs", lambda *_: [tmp_path / "store/x.npy"])
    monkeypatch.setattr(measuring, "verify_on_device", lambda *_: ())  # has tests of its own
    here = Device(name="-", transport="local", python=sys.executable)
    key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    away = Device(name="c", transport="ssh", host="127.0.0.1", port=1, user="nobody", host_key=key)
    devices = {name: dataclasses.replace(here, name=name, workdir=str(tmp_path / f"at-{name}")) for name in "ab"}
    tonight = dataclasses.replace(plan(tmp_path / "results", "a,b,c"), devices=devices | {"c": away})
    suite = Suite(recipe="r", rounds=2, min_samples=20, min_duration_ms=1, max_warmup_ms=50, canary=False)

    def measure(device: Device, steps: Steps) -> Path:
        store = Store(tmp_path / "store")
        limits = ParityChoice()
        return measuring.measure_build(build, [proof], store, device, suite, tonight.results, steps, limits=limits)

    night = do_night(tonight, measure, build=digest(build))
    for name, one in zip("ab", night.devices, strict=False):
        bundle = open_bundle(tonight.results / str(one.run))
        assert (bundle.header.device, bundle.finished, len(bundle.trials)) == (name, True, 2)
        assert not list((tmp_path / f"at-{name}").glob("lease*"))
    assert night.devices[2].error == "Unreachable"
    assert night.exit_code == 4
