"""Racks of several hosts, each a process, behind a real scheduler: whatever ends, no trial is lost or doubled."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from make.dask_ends import collect_after_dask  # noqa: F401 - a fixture for every test here
from make.racks import QUIET, Running, plan_run, running
from make.waiting import wait_until
from make.wires import Wire
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_benchmarks.fleet.schedule import Job, read_jobs
from rankship_benchmarks.fleet.threads import Ended, run_fleet
from rankship_benchmarks.rack import calls
from rankship_benchmarks.rack.errand import Maker
from rankship_benchmarks.rack.home import open_rack
from rankship_benchmarks.rack.keys import find_way, make_keys
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.errors import InputError, RankshipError, TargetError, Unreachable

pytestmark = [
    pytest.mark.slow,
    # of sockets that Dask leaves to the garbage collector when a connection ends
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
LOOK_S = 0.3


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path) as started:
        started.start_scheduler()
        yield started


def measure_meanwhile(rack: Running, device: str, meanwhile: Callable[[], None], patience_s: float = 60.0) -> Path:
    """Measure on a device whose host holds its first trial, and do something to the rack until it may go on."""
    plan, ended = plan_run(rack.folder), dict[str, Path | RankshipError]()
    rack.hold("one", on=True)
    with open_rack(rack.way, patience_s=patience_s, look_s=LOOK_S) as home:

        def measure() -> None:
            try:
                ended["run"] = home.measure(plan, device, QUIET)
            except RankshipError as failure:
                ended["run"] = failure

        thread = threading.Thread(target=measure)
        thread.start()
        wait_until(rack.count_measured, 300)
        meanwhile()
        rack.hold("one", on=False)
        thread.join(300)
    run = ended["run"]
    if isinstance(run, RankshipError):
        raise run
    return run


def check_whole(rack: Running, run: Path, device: str) -> None:
    bundle = open_bundle(run)
    assert bundle.finished
    assert [trial.round for trial in bundle.trials] == [0, 1, 2]
    assert rack.count_measured() == {f"{device} r {number}": 1 for number in range(3)}
    assert [path.name for path in run.parent.glob("[!.]*")] == [run.name]
    assert not list(run.parent.glob(".errands/*"))
    assert not list(rack.folder.glob("*/errands/*"))  # the host knows that it is home


def test_a_host_that_is_killed_goes_on_with_its_errand_when_it_is_back(rack: Running) -> None:
    rack.start_host("one", ["a"])

    def kill() -> None:
        rack.end("one")
        rack.start_host("one", ["a"])

    check_whole(rack, measure_meanwhile(rack, "a", kill), "a")


def test_a_host_that_is_asked_to_end_finishes_its_trial_and_goes_on_later(rack: Running) -> None:
    rack.start_host("one", ["a"])

    def restart() -> None:
        rack.processes["one"].send_signal(signal.SIGTERM)
        wait_until(lambda: "no more errands" in rack.read_log("one"))
        rack.hold("one", on=False)
        rack.processes.pop("one").wait(300)
        rack.hold("one", on=True)
        rack.start_host("one", ["a"])

    check_whole(rack, measure_meanwhile(rack, "a", restart), "a")


def test_a_scheduler_that_is_killed_and_started_again_is_found_again(rack: Running) -> None:
    rack.start_host("one", ["a"])

    def restart() -> None:
        rack.end("scheduler")
        rack.start_scheduler()
        wait_until(lambda: rack.read_log("one").count(": offered to") == 2, 300)

    check_whole(rack, measure_meanwhile(rack, "a", restart), "a")


def test_a_lost_hosts_job_goes_to_the_twin_that_is_named_as_one(rack: Running) -> None:
    rack.start_host("one", ["a"])
    rack.start_host("two", ["b"])
    plan, ended = plan_run(rack.folder), dict[str, Ended[Path]]()
    rack.hold("one", on=True)
    with open_rack(rack.way, patience_s=1.0, look_s=LOOK_S) as home:

        def work(device: str, _: Job) -> Path:
            return home.measure(plan, device, QUIET)

        thread = threading.Thread(target=lambda: ended.update(run_fleet(read_jobs("a/b"), work, pauses_s=())))
        thread.start()
        wait_until(rack.count_measured, 300)
        rack.end("one")
        thread.join(300)
    outcome, run = ended["a"].outcome, ended["a"].result
    assert outcome.device == "b"
    assert "a: Unreachable: no host of the rack offers a" in outcome.losses
    assert run is not None
    assert open_bundle(run).header.device == "b"
    assert [path.name for path in run.parent.glob("[!.]*")] == [run.name]
    assert rack.count_measured() == {"a r 0": 1} | {f"b r {number}": 1 for number in range(3)}


def test_a_home_that_is_killed_finds_its_errand_again(rack: Running) -> None:
    rack.start_host("one", ["a"])
    plan_run(rack.folder)
    rack.hold("one", on=True)
    home = rack.start_home("a")
    wait_until(rack.count_measured, 300)
    home.kill()
    home.wait()
    rack.hold("one", on=False)
    assert rack.start_home("a").wait(300) == 0
    (run,) = (rack.folder / "results").glob("[!.]*")
    check_whole(rack, run, "a")


def test_an_errand_whose_home_is_gone_makes_room_for_another(rack: Running) -> None:
    rack.start_host("one", ["a"])
    plan_run(rack.folder)
    rack.hold("one", on=True)
    home = rack.start_home("a")
    wait_until(rack.count_measured, 300)
    home.kill()
    home.wait()
    other = plan_run(rack.folder, recipe="other")
    with open_rack(rack.way, look_s=LOOK_S) as here:
        ended: list[Path] = []
        thread = threading.Thread(target=lambda: ended.append(here.measure(other, "a", QUIET)))
        thread.start()
        wait_until(lambda: "nobody asks for its errand" in rack.read_log("one"))
        rack.hold("one", on=False)
        thread.join(300)
    assert open_bundle(ended[0]).finished
    assert rack.count_measured() == {"a r 0": 1} | {f"a other {number}": 1 for number in range(3)}
    assert rack.start_home("a").wait(300) == 0
    assert rack.count_measured() == {f"a {recipe} {number}": 1 for recipe in ("r", "other") for number in range(3)}


def test_each_host_gets_a_file_once_and_tells_whoever_asks_for_another_device(
    rack: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    rack.start_host("one", ["a", "b", "c"])
    plan, sent = plan_run(rack.folder), list[str]()
    plan.store.root.joinpath("artifact-1", "input.0.npy").write_bytes(bytes(9 << 20))  # three parts
    add = calls.add_part
    with open_rack(rack.way, look_s=LOOK_S) as home:
        call = home._call

        def see(device: str, function: Any, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - as in Rack
            if function is add:
                sent.append(f"{arguments[0]} {arguments[2]}")
            return call(device, function, *arguments, **options)

        monkeypatch.setattr(home, "_call", see)
        ended = run_fleet(read_jobs("a,b,c"), lambda device, _: home.measure(plan, device, QUIET), pauses_s=())
        assert [one.error for one in ended.values()] == [None] * 3
        assert len(sent) == len(set(sent)) == 3 + 2  # and the model with its manifest
        with pytest.raises(Unreachable, match="no host of the rack offers d") as refused:
            home._call("d", calls.forget, "t", patience_s=0.1)
    assert "offered now: a, b, c" in refused.value.hint


def test_a_file_that_changed_on_the_way_is_refused_and_an_error_comes_home(rack: Running) -> None:
    rack.start_host("one", ["a"])
    with open_rack(rack.way, look_s=LOOK_S) as home:
        with pytest.raises(TargetError, match="a file came as"):
            home._call("a", calls.add_part, "0" * 64, "s", 0, b"other", 5)
        other = encode(Maker(version="0", agent_sha256="0" * 64))
        with pytest.raises(InputError, match=r"has rankship .*, this machine has 0 \(agent 00000000\)") as refused:
            home._call("a", calls.check, other, ("onnx",), False)  # noqa: FBT003 - it travels
    assert "same release" in refused.value.hint


def test_without_the_racks_keys_nobody_gets_in(rack: Running, tmp_path: Path) -> None:
    assert rack.way.address.startswith("tls://")
    (tmp_path / "others").mkdir()
    make_keys(tmp_path / "others")
    for keys in (None, tmp_path / "others"):
        stranger = find_way(f"tcp://127.0.0.1:{rack.port}", keys)
        with pytest.raises(InputError, match="no scheduler of a rack at"), open_rack(stranger):
            pass


def test_on_this_machine_alone_a_rack_needs_no_keys(tmp_path: Path) -> None:
    with running(tmp_path, with_keys=False) as rack:
        rack.start_scheduler()
        rack.start_host("one", ["a"])
        with open_rack(rack.way, look_s=LOOK_S) as home:
            check_whole(rack, home.measure(plan_run(tmp_path), "a", QUIET), "a")


def test_two_hundred_devices_do_every_job_of_a_thousand_once(rack: Running) -> None:
    hosts, devices, jobs = 4, 50, 5
    for host in range(hosts):
        rack.start_host(f"host{host}", [f"d{host}-{number}" for number in range(devices)])
    names = [f"d{host}-{number}" for host in range(hosts) for number in range(devices)]
    plans = [plan_run(rack.folder, recipe=f"r{number}", rounds=1) for number in range(jobs)]
    wanted = [Job(name=f"{name} {plan.build.recipe}", devices=(name,)) for name in names for plan in plans]
    by_recipe = {plan.build.recipe: plan for plan in plans}
    with open_rack(rack.way) as home:

        def work(device: str, job: Job) -> Path:
            return home.measure(by_recipe[job.name.split()[1]], device, QUIET)

        ended = run_fleet(wanted, work)
    assert {name: one.error for name, one in ended.items() if one.error} == {}
    assert rack.count_measured() == {f"{job.name} 0": 1 for job in wanted}
    runs = {one.result for one in ended.values()}
    assert len(runs) == len(wanted)
    assert set((rack.folder / "results").glob("[!.]*")) == runs


@pytest.mark.system
def test_a_host_whose_network_is_cut_goes_on_and_nothing_is_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TCP", "CONNECT"):  # instead of half a minute; Dask takes nothing under eleven seconds
        monkeypatch.setenv(f"DASK_DISTRIBUTED__COMM__TIMEOUTS__{name}", "12s")
    with Wire() as wire, running(tmp_path) as rack:
        rack.address = wire.near
        rack.start_scheduler()
        rack.start_host("one", ["a"], *wire.inside)

        def cut() -> None:
            wire.cut()
            wait_until(lambda: "no longer offered" in rack.read_log("one"), 300)
            rack.hold("one", on=False)  # it measures on meanwhile
            wait_until(lambda: rack.count_measured().total() == 3, 300)
            rack.hold("one", on=True)
            wire.mend()
            wait_until(lambda: rack.read_log("one").count(": offered to") == 2, 300)

        check_whole(rack, measure_meanwhile(rack, "a", cut, patience_s=120.0), "a")


def test_a_scheduler_that_repeats_errands_by_itself_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, with_keys=False) as rack:
        start = "import sys; from distributed.cli.dask_scheduler import main; main(sys.argv[1:])"
        words = ["--host", "127.0.0.1", "--port", str(rack.port), "--no-dashboard", "--no-show"]
        rack.processes["lax"] = subprocess.Popen([sys.executable, "-c", start, *words], stderr=subprocess.DEVNULL)
        with pytest.raises(InputError, match="repeats a lost errand 3 times"), open_rack(rack.way):
            pass
