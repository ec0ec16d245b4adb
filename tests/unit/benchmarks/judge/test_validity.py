"""Which trials count, and that no other enters a figure."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from make.artifacts import CANARY, make_artifact
from make.builds import make_build
from make.bundles import make_header
from make.trials import CALM, HOT, UNTOLD, make_trial
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.judge.summary import summarise
from rankship_benchmarks.judge.validity import (
    RULES,
    doubt_trial,
    find_canary_off,
    find_frequency_move,
    judge_trial,
    keep_trusted,
    name_distrust,
)
from rankship_pipeline.foundation.errors import ClockJumped, MeasurementError, Throttled
from rankship_targets.trials.trial import Conditions, DeviceState, Span, Trial

TRIAL = make_trial()


@pytest.mark.parametrize(
    ("before", "after", "reasons"),
    [
        ({}, {}, ()),
        ({}, {"clock_offset_ns": 10**18 + 999_999_999}, ()),
        ({}, {"clock_offset_ns": 10**18 + 1_000_000_001}, ("clock jumped",)),
        ({}, {"clock_offset_ns": 10**18 - 1_000_000_001}, ("clock jumped",)),
        ({"clock_offset_ns": None}, {}, ()),
        ({}, {"throttled_bits": 0x10000}, ("throttled",)),
        ({"throttled_bits": 0x50000}, {"throttled_bits": 0x50000}, ()),
        ({"throttled_bits": 0x50000}, {"throttled_bits": 0xD0000}, ("throttled",)),
        ({"throttled_bits": 0x50005}, {"throttled_bits": 0x50000}, ("throttled",)),
        ({}, {"throttled_bits": 0x50004}, ("throttled",)),
        ({"throttled_bits": None}, {"throttled_bits": 0x50000}, ()),
        ({}, {"throttle_count": 4}, ("throttled",)),
        ({"throttle_count": None}, {"throttle_count": 4}, ()),
        ({"cooling_steps": 1}, {}, ("throttled",)),
        ({}, {"governor": "ondemand"}, ("governor changed",)),
        ({"governor": None}, {}, ()),
        ({}, {"clock_offset_ns": 0, "throttle_count": 4}, ("throttled", "clock jumped")),
        ({"boot_id": "one"}, {"boot_id": "two"}, ("device restarted",)),
        ({}, {"boot_id": "two"}, ()),
        ({"battery_percent": 19, "charging": False}, {}, ("battery low",)),
        ({}, {"battery_percent": 19}, ("battery low",)),
        ({"battery_percent": 19, "charging": True}, {}, ()),
        ({"battery_percent": 20, "charging": False}, {}, ()),
    ],
)
def test_what_changed_under_a_trial_is_a_reason(
    before: dict[str, Any], after: dict[str, Any], reasons: tuple[str, ...]
) -> None:
    assert judge_trial(replace(TRIAL, before=replace(CALM, **before), after=replace(CALM, **after))) == reasons


def test_what_is_not_told_is_no_reason() -> None:
    for before, after in ((UNTOLD, UNTOLD), (UNTOLD, CALM), (CALM, UNTOLD)):
        assert judge_trial(replace(TRIAL, before=before, after=after)) == ()
        assert doubt_trial(replace(TRIAL, before=before, after=after)) == ()


def test_two_samples_have_no_middle_one() -> None:
    assert judge_trial(replace(TRIAL, samples_ns=(100, 100))) == ("too few samples",)


SLOW = 600_000_000  # ns


@pytest.mark.parametrize(
    ("trial", "reasons"),
    [
        (TRIAL, ()),
        (replace(TRIAL, after=replace(CALM, frequency_khz=(1_300_000,))), ("frequency moved",)),
        (replace(TRIAL, after=replace(CALM, frequency_khz=(1_400_000,))), ()),
        (replace(TRIAL, samples_ns=(100, 100, 111, 111)), ("drift inside the trial",)),
        (replace(TRIAL, samples_ns=(100, 100, 89, 89)), ("drift inside the trial",)),
        (replace(TRIAL, samples_ns=(100, 100, 109, 109)), ()),
        (replace(TRIAL, before=replace(CALM, load_1m_milli=1_001)), ("other load",)),
        (replace(TRIAL, before=replace(CALM, load_1m_milli=1_000)), ()),
        (replace(TRIAL, samples_ns=(100, 100, SLOW, 100, 100)), ("interrupted",)),
        (replace(TRIAL, samples_ns=(SLOW, SLOW, SLOW, SLOW, SLOW)), ()),
    ],
)
def test_what_makes_a_trial_no_witness_is_a_doubt_and_no_refusal(trial: Trial, reasons: tuple[str, ...]) -> None:
    assert (doubt_trial(trial), judge_trial(trial)) == (reasons, ())
    assert (keep_trusted([trial]) == ()) == bool(reasons)


def test_a_clock_that_may_follow_the_load_is_not_said_to_move() -> None:
    states = [replace(CALM, governor="schedutil", frequency_khz=(khz,)) for khz in (600_000, 1_500_000)]
    assert doubt_trial(replace(TRIAL, before=states[0], after=states[1])) == ()


def test_only_the_cores_that_a_trial_ran_on_may_move_its_clock() -> None:
    early, late = (replace(CALM, frequency_khz=(khz, 1_500_000)) for khz in (600_000, 1_500_000))
    trial = replace(TRIAL, before=early, after=late, conditions=Conditions(cpus=(1,)))
    assert find_frequency_move(trial) == 0
    assert find_frequency_move(replace(trial, conditions=Conditions(cpus=(0, 1)))) == 1.5


def test_a_round_whose_canary_is_off_is_no_witness() -> None:
    rounds = [replace(TRIAL, round=number) for number in range(4)]
    canaries = [replace(one, key=CANARY) for one in rounds]
    canaries[2] = replace(canaries[2], samples_ns=(111, 111, 111))
    everything = [*rounds, *canaries]
    assert find_canary_off(everything) == {2}
    assert {trial.round for trial in keep_trusted(everything)} == {0, 1, 3}
    assert name_distrust(rounds, everything) == {"canary off": 1}
    assert find_canary_off([*rounds, *canaries[1:3]]) == set()


def test_a_doubt_is_said_and_its_trial_still_drawn() -> None:
    summary = summarise(make_bundle(TRIAL, replace(TRIAL, round=1, before=replace(CALM, load_1m_milli=9_000))))
    assert summary.results[0].latency_ns.rounds == 2
    said = "Doubted: other load in 1 of 2 trials (round 1); no verdict between runs uses them."
    assert said in summary.cautions


@given(st.from_type(Trial))
def test_any_trial_is_judged(trial: Trial) -> None:
    assert {*judge_trial(trial), *doubt_trial(trial)} <= set(RULES)
    assert keep_trusted([trial]) == (() if judge_trial(trial) or doubt_trial(trial) else (trial,))


def make_bundle(*trials: Trial) -> Bundle:
    header = make_header(make_build(make_artifact()), rounds=len(trials))
    return Bundle(header=header, trials=trials, finished=True)


BAD = replace(TRIAL, samples_ns=(900,) * 400, after=HOT)


def test_an_invalid_trial_enters_no_figure_and_is_named() -> None:
    bundle = make_bundle(TRIAL, replace(BAD, round=1), replace(TRIAL, round=2))
    summary = summarise(bundle)
    (result,) = summary.results
    assert (result.latency_ns.value, result.latency_ns.rounds, result.most_samples) == (100, 2, 3)
    assert "Not counted: round 1 of dense onnx: throttled while it was measured." in summary.cautions


@pytest.mark.parametrize(
    ("after", "error"),
    [
        (HOT, Throttled),
        (replace(CALM, clock_offset_ns=0), ClockJumped),
        (replace(CALM, governor="ondemand"), MeasurementError),
    ],
)
def test_a_run_of_which_nothing_counts_is_refused(after: DeviceState, error: type[MeasurementError]) -> None:
    with pytest.raises(error, match="run one: no trial counts") as caught:
        summarise(make_bundle(*[replace(TRIAL, round=number, after=after) for number in range(2)]))
    assert type(caught.value) is error


def test_conditions_that_could_not_be_had_are_said() -> None:
    unmet = Conditions(unmet=("governor performance: Permission denied",))
    summary = summarise(make_bundle(replace(TRIAL, conditions=unmet), replace(TRIAL, round=1)))
    assert "Conditions: governor performance: Permission denied (1 of 2 trials)." in summary.cautions


@pytest.mark.parametrize(
    ("threads", "waited_ns", "loop", "load_1m_milli", "doubted"),
    [
        (1, 10_000_000, Span(start_ns=0, end_ns=10**9), 9_000, False),  # others were at work, elsewhere
        (1, 10_000_001, Span(start_ns=0, end_ns=10**9), 100, True),  # one that the load average missed
        (1, None, Span(start_ns=0, end_ns=10**9), 9_000, True),
        (1, 0, None, 9_000, True),
        (4, 0, Span(start_ns=0, end_ns=10**9), 9_000, True),
        (4, 900_000_000, Span(start_ns=0, end_ns=10**9), 100, False),  # for each other, as far as is known
    ],
)
def test_one_threads_own_waiting_decides_about_other_load_and_else_the_load_average(
    threads: int, waited_ns: int | None, loop: Span | None, load_1m_milli: int, *, doubted: bool
) -> None:
    before = replace(CALM, load_1m_milli=load_1m_milli)
    trial = replace(TRIAL, before=before, threads=threads, waited_ns=waited_ns, loop=loop)
    assert doubt_trial(trial) == (("other load",) if doubted else ())
