"""A host, without Dask: an errand is done once, is found again by its ticket, and makes room when nobody wants it."""

import asyncio
import errno
import os
from dataclasses import fields
from pathlib import Path

import pytest

from make.racks import plan_run, pretend
from make.waiting import wait_until
from rankship_benchmarks.bundle.bundle import BUNDLE_FILE, open_bundle
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_benchmarks.rack.content import Content
from rankship_benchmarks.rack.errand import Errand, read_plan, write_errand
from rankship_benchmarks.rack.home import land
from rankship_benchmarks.rack.host import Answer, Host, Measuring
from rankship_benchmarks.rack.tickets import drop_tickets, return_ticket, take_ticket
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import ConnectionLost, TargetError
from rankship_pipeline.foundation.store import Store
from rankship_targets.devices.device import Device

A = Device(name="a", transport="local")


def make_host(folder: Path, measure: Measuring = pretend, wait_s: float = 30.0, asked_s: float = 60.0) -> Host:
    return Host({"a": A}, folder / "spool", (), measure, wait_s=wait_s, asked_s=asked_s)


def bring_all(plan: RunPlan, errand: Errand, content: Content) -> None:
    for name, sha256 in errand.files.items():
        data = (plan.store.root / name).read_bytes()
        content.add_part(sha256, "s", 0, data, len(data))


def ask(host: Host, text: str, ticket: str = "t") -> Answer:
    return asyncio.run(host.carry_out("a", ticket, text))


def test_a_plan_travels_whole(tmp_path: Path) -> None:
    ends = {"store", "results", "signers", "exam"}  # each end has its own; an exam is refused before it would travel
    assert {one.name for one in fields(RunPlan)} - ends == {one.name for one in fields(Errand)} - {"maker", "files"}
    plan = plan_run(tmp_path)
    errand = decode(Errand, encode(write_errand(plan)), where="here")
    assert set(errand.files) == {"artifact-1/model.onnx", "artifact-1/model.onnx.manifest.json"}
    again = read_plan(errand, plan.store, plan.results, ())
    assert (again.build, tuple(again.verified), again.suite) == (plan.build, tuple(plan.verified), plan.suite)


def test_an_errand_says_what_it_lacks_is_done_once_and_forgotten_when_it_is_home(tmp_path: Path) -> None:
    plan, host = plan_run(tmp_path), make_host(tmp_path)
    errand = write_errand(plan)
    text = encode(errand)
    assert set(ask(host, text).missing) == set(errand.files.values())
    bring_all(plan, errand, host.content)
    answer = ask(host, text)
    assert ask(host, text).files == answer.files  # it was not fetched, and is not measured again
    assert (tmp_path / "spool/measured").read_text().count("\n") == 3
    run = land(plan, "a", answer)
    assert land(plan, "a", answer) == run  # the home was killed before it noted that
    assert open_bundle(run).finished
    assert [path.name for path in plan.results.iterdir()] == [run.name]
    host.forget("t")
    assert ask(host, text).files != answer.files


def test_an_unfinished_errand_goes_on_where_it_was(tmp_path: Path) -> None:
    plan, fail = plan_run(tmp_path), [True]

    def lose(plan: RunPlan, device: Device, _: Steps) -> Path:
        def stop(part: str) -> None:
            if fail and part == "round 2":
                fail.pop()
                raise ConnectionLost("cable out", hint="plug it in")

        return pretend(plan, device, Steps(quiet=True, on_part=stop))

    host, errand = make_host(tmp_path, lose), write_errand(plan)
    bring_all(plan, errand, host.content)
    with pytest.raises(ConnectionLost, match="cable out") as lost, host.naming_itself():
        ask(host, encode(errand))
    assert lost.value.hint == f"on {host.name}: plug it in"
    assert [trial.round for trial in open_bundle(land(plan, "a", ask(host, encode(errand)))).trials] == [0, 1, 2]
    assert (tmp_path / "spool/measured").read_text().count("\n") == 3


def test_an_errand_that_nobody_asks_for_is_ended_between_two_trials_for_the_next(tmp_path: Path) -> None:
    plan, host = plan_run(tmp_path), make_host(tmp_path, wait_s=0.05, asked_s=1000.0)
    errand, hold = write_errand(plan), tmp_path / "spool/hold"
    text = encode(errand)
    bring_all(plan, errand, host.content)
    hold.touch()

    async def leave_and_come() -> Answer:
        first = await host.carry_out("a", "first", text)
        while first.number == 0:
            first = await host.follow("a", "first")
        assert (first.part, first.number, first.files, first.unknown) == ("round 1", 1, {}, False)
        second = await host.carry_out("a", "second", text)
        assert (second.unknown, second.part) == (True, "a is at another errand")
        assert not (await host.follow("a", "first")).unknown  # it is asked for: the other waits
        host._asked_s = -1.0
        await host.carry_out("a", "second", text)
        while not (tmp_path / "spool/measured").exists():  # noqa: ASYNC110 - another thread writes it
            await asyncio.sleep(0.01)
        hold.unlink()
        while not (answer := await host.carry_out("a", "second", text)).files:
            pass
        return answer

    assert asyncio.run(leave_and_come()).files
    (left,) = (tmp_path / "spool/errands/first").glob(f"results/*/{BUNDLE_FILE}")
    assert [trial.round for trial in open_bundle(left.parent).trials] == [0]
    again = make_host(tmp_path)
    assert len(open_bundle(land(plan, "a", ask(again, text, "first"))).trials) == 3


def test_asked_to_stop_a_host_ends_its_errands_after_their_trials(tmp_path: Path) -> None:
    plan, host = plan_run(tmp_path), make_host(tmp_path)
    errand = write_errand(plan)
    bring_all(plan, errand, host.content)
    (tmp_path / "spool/hold").touch()

    async def stop() -> None:
        errand_done = asyncio.ensure_future(host.carry_out("a", "t", encode(errand)))
        await asyncio.to_thread(wait_until, (tmp_path / "spool/measured").exists)
        stopped = asyncio.ensure_future(host.stop())
        await asyncio.sleep(0.05)
        assert not stopped.done()
        (tmp_path / "spool/hold").unlink()
        await stopped
        assert (await errand_done).unknown

    asyncio.run(stop())
    assert (tmp_path / "spool/measured").read_text() == "a r 0\n"


def test_a_run_that_was_not_asked_for_does_not_land(tmp_path: Path) -> None:
    plan, host = plan_run(tmp_path), make_host(tmp_path)
    errand = write_errand(plan)
    bring_all(plan, errand, host.content)
    answer = ask(host, encode(errand))
    for other, device in ((plan, "b"), (plan_run(tmp_path, recipe="other"), "a")):
        with pytest.raises(TargetError, match="which was not asked for"):
            land(other, device, answer)
    assert list(plan.results.iterdir()) == []


def test_a_hosts_own_trouble_with_its_disk_is_named(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    with pytest.raises(TargetError, match="No space left") as full, host.naming_itself():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert host.name in str(full.value)


def test_a_mistake_in_the_program_comes_to_whoever_asked(tmp_path: Path) -> None:
    def fail(*_: object) -> Path:
        raise ZeroDivisionError

    plan, host = plan_run(tmp_path), make_host(tmp_path, fail)
    errand = write_errand(plan)
    bring_all(plan, errand, host.content)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            ask(host, encode(errand))


def test_a_ticket_is_found_again_until_it_is_returned_or_its_night_is_over(tmp_path: Path) -> None:
    first = take_ticket(tmp_path, "a", "r", "e1")
    assert take_ticket(tmp_path, "a", "r", "e1") == first
    others = [take_ticket(tmp_path, *one) for one in (("b", "r", "e1"), ("a", "r", "e2"), ("a", "q", "e3"))]
    assert len({one.name for one in (first, *others)}) == 4
    return_ticket(tmp_path, "a", "e1")
    assert take_ticket(tmp_path, "a", "r", "e1") != first
    drop_tickets(tmp_path, "r", ["a"])
    assert take_ticket(tmp_path, "a", "r", "e2") != others[1]
    assert [take_ticket(tmp_path, *one) for one in (("b", "r", "e1"), ("a", "q", "e3"))] == [others[0], others[2]]


def test_what_nobody_fetched_for_a_week_is_swept(tmp_path: Path) -> None:
    plan, host = plan_run(tmp_path), make_host(tmp_path)
    errand = write_errand(plan)
    bring_all(plan, errand, host.content)
    ask(host, encode(errand))
    host.sweep()
    assert (tmp_path / "spool/errands/t").exists()
    os.utime(tmp_path / "spool/errands/t", (0, 0))
    host.sweep()
    assert not (tmp_path / "spool/errands/t").exists()
    assert Store(tmp_path / "store").root.exists()
    assert host.content.list_missing(errand.files.values()) == ()
