"""A fleet loses no job, does none twice and never hangs, whatever its devices do."""

import random
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankship_benchmarks.fleet.schedule import MOST_LOSSES, Job, Schedule, read_jobs
from rankship_benchmarks.fleet.threads import run_fleet
from rankship_pipeline.foundation.errors import BuildError, ConnectionLost, InputError, Lacks, TargetBusy

TWINS = Job(name="j", devices=("a", "b"), home="a")


def test_a_job_stays_at_home_while_home_is_there_and_goes_to_its_twin_when_not() -> None:
    schedule = Schedule([TWINS], ["a", "b"])
    assert schedule.take("b") is None
    assert schedule.take("a") == TWINS
    schedule.lose("a", "cable out")
    assert schedule.take("a") is None
    assert schedule.take("b") == TWINS
    schedule.finish("b")
    assert schedule.finished
    (outcome,) = schedule.outcomes.values()
    assert (outcome.device, outcome.failure, outcome.losses) == ("b", None, ("a: cable out",))


def test_without_a_twin_a_job_waits_for_its_device() -> None:
    schedule = Schedule([Job(name="j", devices=("a",))], ["a"])
    schedule.take("a")
    schedule.lose("a", "rebooted")
    assert not schedule.finished
    schedule.restore("a")
    assert schedule.take("a") is not None


def test_a_job_that_loses_every_device_ends_and_so_does_one_that_only_gone_devices_could_do() -> None:
    schedule = Schedule([Job(name="poison", devices=("a",)), Job(name="next", devices=("a",))], ["a"])
    for _ in range(MOST_LOSSES):
        schedule.restore("a")
        schedule.take("a")
        schedule.lose("a", "out of memory")
    assert len(schedule.outcomes["poison"].losses) == MOST_LOSSES
    schedule.give_up("a", "quarantined")
    assert schedule.finished
    assert schedule.outcomes["next"].failure == "a: quarantined"


@pytest.mark.parametrize("jobs", [[TWINS, TWINS], [Job(name="x", devices=("c",))], [Job(name="x", devices=())]])
def test_jobs_that_cannot_be_told_apart_or_done_are_a_mistake(jobs: list[Job]) -> None:
    with pytest.raises(ValueError, match=r"occurs twice|unknown device"):
        Schedule(jobs, ["a", "b"])


def test_devices_are_named_with_their_twins() -> None:
    jobs = read_jobs("pi4 / pi4 spare, pixel6,pixel6")
    assert [(job.name, job.home, job.devices) for job in jobs] == [
        ("pi4", "pi4", ("pi4", "pi4 spare")),
        ("pixel6", "pixel6", ("pixel6",)),
    ]
    with pytest.raises(InputError, match="pi4 is in --on twice"):
        read_jobs("pi4,pi4/pi5")


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 40))
def test_every_job_ends_exactly_once_under_any_order_of_faults(seed: int, devices: int, jobs: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - a die
    names = [f"d{number}" for number in range(devices)]
    wanted = []
    for number in range(jobs):
        able = tuple(dice.sample(names, dice.randint(1, devices)))
        wanted.append(Job(name=f"j{number}", devices=able, home=dice.choice((None, able[0]))))
    schedule, done, lost = Schedule(wanted, names), Counter[str](), set[str]()
    for _ in range(100 * jobs):
        if schedule.finished:
            break
        device = dice.choice(names)
        if device in schedule.running:
            fate = dice.random()
            if fate < 0.6:
                done[schedule.running[device].name] += 1
                schedule.finish(device)
            elif fate < 0.7:
                schedule.fail(device, "of its own")
            else:
                schedule.lose(device, "lost")
                lost.add(device)
        elif device in lost and dice.random() < 0.5:
            lost.discard(device)
            schedule.restore(device)
        elif device in lost and dice.random() < 0.1:
            schedule.give_up(device, "gone")
        else:
            job = schedule.take(device)
            assert job is None or device in job.devices
    assert schedule.finished
    assert set(schedule.outcomes) == {job.name for job in wanted}
    assert {name for name, one in schedule.outcomes.items() if one.failure is None} == set(done)
    assert set(done.values()) <= {1}


def test_threads_do_one_job_per_device_at_a_time_and_faults_stop_no_other_device() -> None:
    names = [f"d{number}" for number in range(8)]
    busy, lock, dice, most = Counter[str](), threading.Lock(), random.Random(5), Counter[str]()  # noqa: S311 - a die
    fates = {f"j{number}": dice.choice(("fine", "fine", "fine", "lost once", "bad")) for number in range(200)}
    jobs = [Job(name=name, devices=tuple(dice.sample(names, 3))) for name in fates]
    tried, done = Counter[str](), Counter[str]()

    def work(device: str, job: Job) -> str:
        with lock:
            busy[device] += 1
            most[device] = max(most[device], busy[device])
            tried[job.name] += 1
            first = tried[job.name] == 1
        try:
            if fates[job.name] == "lost once" and first:
                raise ConnectionLost("cable out", hint="")
            if fates[job.name] == "bad":
                raise BuildError("not this file", hint="")
            with lock:
                done[job.name] += 1
            return f"{job.name} by {device}"
        finally:
            with lock:
                busy[device] -= 1

    ended = run_fleet(jobs, work, pauses_s=(0.0,) * 200)
    assert list(ended) == [job.name for job in jobs]
    assert set(most.values()) == {1}
    for name, fate in fates.items():
        assert (ended[name].error is None) == (fate != "bad")
        assert done[name] == (fate != "bad")
        assert len(ended[name].outcome.losses) == (fate == "lost once")
        assert ended[name].result == (None if fate == "bad" else f"{name} by {ended[name].outcome.device}")


def test_a_device_that_trying_again_cannot_help_is_given_up_and_its_twin_stands_in() -> None:
    asked = Counter[str]()

    def work(device: str, _: Job) -> str:
        asked[device] += 1
        if device == "a":
            raise Lacks("no runtime", hint="kit")
        if device == "c":
            raise TargetBusy("held", hint="wait")
        return device

    ended = run_fleet([TWINS, Job(name="c", devices=("c",))], work, pauses_s=(0.0,))
    assert ended["j"].result == "b"
    assert ended["j"].outcome.losses == ("a: Lacks: no runtime",)
    assert isinstance(ended["c"].error, TargetBusy)
    assert asked == {"a": 1, "b": 1, "c": 2}


def test_a_mistake_in_the_program_ends_everything_with_its_traceback() -> None:
    def work(device: str, _: Job) -> None:
        if device == "a":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_fleet([Job(name="1", devices=("a",)), Job(name="2", devices=("b",))], work)
