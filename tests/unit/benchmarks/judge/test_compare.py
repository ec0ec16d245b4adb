"""Verdicts between two runs: what they say, when they refuse, and how often they err on noise of known kind."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from make.artifacts import CANARY, COMPRESSED, DENSE, make_artifact
from make.builds import make_build
from make.bundles import change_trials, keep, make_header
from make.trials import CALM, make_reading, make_trial
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.judge.comparability import ASPECTS, find_differences, refuse_unlike_runs
from rankship_benchmarks.judge.compare import Rule, Verdict, compare_bundles, count_rounds_needed
from rankship_benchmarks.stats.disorder import find_disorder, find_drift, find_two_speeds
from rankship_benchmarks.stats.estimates import estimate_median, find_correlation
from rankship_benchmarks.stats.shift import correct_holm, find_least_p, find_shift
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.artifact_key import VARIANTS, ArtifactKey
from rankship_pipeline.foundation.errors import InputError, UnlikeConditions
from rankship_pipeline.foundation.formats import FORMATS
from rankship_targets.trials.trial import Conditions


def make_bundle(times_ns: dict[ArtifactKey, list[float]], run_id: str = "one", canary: str | None = None) -> Bundle:
    """`canary` is the file that is said to have been timed as such; the default where times of one are given."""
    build = make_build(*(make_artifact(case) for case in times_ns if case != CANARY))
    frozen = make_artifact(CANARY, sha256=canary or "canary onnx") if CANARY in times_ns else None
    conditions = {"kernel": "6.1", "timed loop": "200 inferences"}
    rounds = max(map(len, times_ns.values()))
    header = make_header(build, run_id=run_id, rounds=rounds, conditions=conditions, canary=frozen)
    trials = [
        make_trial(case, round=n, samples_ns=(round(time),) * 3)
        for case, times in times_ns.items()
        for n, time in enumerate(times)
    ]
    if canary:
        trials = [replace(t, artifact_sha256=canary) if t.key.variant == "canary" else t for t in trials]
    return Bundle(header=header, trials=tuple(trials), finished=True)


def draw(seed: int, rounds: int = 16, spread: float = 0.01, factor: float = 1.0) -> list[float]:
    times: list[float] = (factor * 1e6 * np.random.default_rng(seed).lognormal(0, spread, rounds)).tolist()
    return times


def judge(
    before: dict[ArtifactKey, list[float]], after: dict[ArtifactKey, list[float]], **rule: float
) -> list[Verdict]:
    return list(compare_bundles(make_bundle(before), make_bundle(after, "two"), Rule(**rule)))


@pytest.mark.parametrize(
    ("factor", "word"), [(1.0, "same"), (1.03, "worse"), (1.10, "worse"), (1 / 1.03, "better"), (0.5, "better")]
)
def test_a_change_gets_its_word(factor: float, word: str) -> None:
    (verdict,) = judge({DENSE: draw(1)}, {DENSE: draw(2, factor=factor)})
    assert verdict.verdict == word, verdict.reason
    assert verdict.ratio is not None
    assert verdict.ratio.low is not None
    assert verdict.ratio.high is not None
    assert verdict.ratio.low <= factor <= verdict.ratio.high
    assert verdict.threshold == 0.03


def test_too_much_noise_is_unknown_and_says_how_many_rounds_would_tell() -> None:
    (verdict,) = judge({DENSE: draw(1, 12, 0.05)}, {DENSE: draw(2, 12, 0.05)})
    assert verdict.verdict == "unknown"
    wanted = int(verdict.reason.split("about ")[1].split(" ")[0])
    assert 50 < wanted < 400


def test_so_few_rounds_that_nothing_could_ever_be_told_are_said_to_be() -> None:
    cases = [ArtifactKey(variant=variant, format=name) for name in FORMATS for variant in VARIANTS]
    assert (count_rounds_needed(1), count_rounds_needed(6)) == (5, 7)
    before, after = ({case: draw(seed + n, 6) for n, case in enumerate(cases)} for seed in (1, 10))
    assert {(one.verdict, one.reason) for one in judge(before, after)} == {
        ("unknown", "6 and 6 rounds are too few to show any change in one of 6 cases: 7 each are needed")
    }
    assert judge({DENSE: draw(1, 4)}, {DENSE: draw(2, 4)})[0].reason == (
        "only 4 rounds of the baseline count, at least 5 are needed"
    )


def test_a_case_of_one_run_only_is_unknown() -> None:
    verdicts = judge({DENSE: draw(1)}, {DENSE: draw(2), COMPRESSED: draw(3)})
    assert [(one.key.variant, one.verdict) for one in verdicts] == [("dense", "same"), ("compressed", "unknown")]
    assert verdicts[1].reason == "only 0 rounds of the baseline count, at least 5 are needed: it was not measured"


def test_what_slows_everything_alike_is_no_verdict_on_one_case() -> None:
    before = {DENSE: draw(1), CANARY: draw(2)}
    after = {DENSE: draw(3, factor=1.025), CANARY: draw(4, factor=1.025)}
    (verdict,) = judge(before, after)
    assert verdict.verdict == "same"
    assert verdict.canary_ratio is not None
    assert verdict.canary_ratio.value == pytest.approx(1.025, abs=0.01)
    (blind,) = judge({DENSE: before[DENSE]}, {DENSE: after[DENSE]})
    assert blind.verdict == "worse"


def test_a_device_that_changed_gives_no_verdict_at_all() -> None:
    (verdict,) = judge({DENSE: draw(1), CANARY: draw(2)}, {DENSE: draw(3), CANARY: draw(4, factor=1.08)})
    assert verdict.verdict == "unknown"
    assert "the canary itself took 1.0" in verdict.reason


def test_another_canary_is_none() -> None:
    times = {DENSE: draw(1), CANARY: draw(2)}
    (verdict,) = compare_bundles(make_bundle(times), make_bundle(times, "two", canary="another"))
    assert (verdict.verdict, verdict.canary_ratio) == ("same", None)


def test_doubted_rounds_carry_no_verdict_and_are_named() -> None:
    baseline, candidate = make_bundle({DENSE: draw(1)}), make_bundle({DENSE: draw(2)}, "two")
    busy = replace(CALM, load_1m_milli=9_000)
    trials = tuple(replace(t, before=busy) if t.round < 12 else t for t in candidate.trials)
    (verdict,) = compare_bundles(baseline, replace(candidate, trials=trials))
    assert verdict.verdict == "unknown"
    assert verdict.reason.endswith("at least 5 are needed: other load in 12 of 16 rounds")


@pytest.mark.parametrize(
    ("aspect", "changes"),
    [
        ("threads", {"threads": 2}),
        ("agent", {"agent_sha256": "h"}),
        ("governor", {"before": replace(CALM, governor="ondemand"), "after": replace(CALM, governor="ondemand")}),
        ("affinity", {"conditions": Conditions(cpus=(3,))}),
        ("onnx runtime", {"runtime": make_reading(version="2")}),
    ],
)
def test_unlike_conditions_are_refused_by_name_and_may_be_asked_about(aspect: str, changes: dict[str, object]) -> None:
    baseline = change_trials(make_bundle({DENSE: draw(1)}), conditions=Conditions(cpus=(2,)))
    candidate = change_trials(make_bundle({DENSE: draw(2)}, "two"), **{"conditions": Conditions(cpus=(2,)), **changes})
    with pytest.raises(UnlikeConditions, match=f"runs one and two must not be compared: {aspect} was "):
        compare_bundles(baseline, candidate)
    (verdict,) = compare_bundles(baseline, candidate, across=[aspect])
    assert verdict.verdict == "same"
    assert refuse_unlike_runs(baseline, candidate, across=[aspect])[0].aspect == aspect


def test_another_kernel_cautions_and_an_unknown_aspect_is_refused() -> None:
    baseline, candidate = make_bundle({DENSE: draw(1)}), make_bundle({DENSE: draw(2)}, "two")
    newer = replace(candidate, header=replace(candidate.header, conditions={"kernel": "6.2"}))
    (difference,) = refuse_unlike_runs(baseline, newer)
    assert (str(difference), difference.weight) == ("kernel was 6.1, is 6.2", "cautions")
    assert find_differences(baseline, candidate) == ()
    with pytest.raises(InputError, match="no aspect is called moon"):
        refuse_unlike_runs(baseline, candidate, across=["moon"])
    assert {weight for _, weight in ASPECTS.values()} == {"forbids", "cautions"}


def write(bundle: Bundle, folder: Path) -> str:
    return str(keep(folder, bundle))


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (0.9, 0), (1.1, 1)])
def test_the_verb_exits_1_only_for_worse(
    factor: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {DENSE: draw(1), COMPRESSED: draw(2, factor=0.5)}
    baseline = write(make_bundle(times), tmp_path / "a")
    slower = {**times, COMPRESSED: draw(3, factor=0.5 * factor)}
    candidate = write(make_bundle(slower, "two"), tmp_path / "b")
    assert main(["compare", baseline, candidate]) == status
    shown = capsys.readouterr().out
    assert {1.0: "same", 0.9: "better", 1.1: "worse"}[factor] in shown
    assert "No canary counts in both runs" in shown
    assert main(["compare", baseline, candidate, "--effect", "0.5"]) == 0


def test_the_verb_refuses_unlike_runs_with_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = write(make_bundle({DENSE: draw(1)}), tmp_path / "a")
    candidate = write(change_trials(make_bundle({DENSE: draw(2)}, "two"), threads=2), tmp_path / "b")
    assert main(["compare", baseline, candidate]) == 5
    assert "threads was 1, is 2" in capsys.readouterr().err
    assert main(["compare", baseline, candidate, "--across", "threads"]) == 0
    assert main(["compare", baseline, candidate, "--effect", "0"]) == 2


@pytest.mark.parametrize(("first", "second"), [(5, 5), (6, 9), (12, 12)])
def test_the_interval_excludes_1_exactly_where_the_rank_test_rejects(first: int, second: int) -> None:
    random = np.random.default_rng(first)
    agreed = []
    for _ in range(60):
        before, after = random.lognormal(0, 0.02, first), 1.02 * random.lognormal(0, 0.02, second)
        shift = find_shift(before.tolist(), after.tolist())
        if shift.ratio.widening > 1 or shift.ratio.low is None or shift.ratio.high is None:
            continue
        assert shift.p_value == pytest.approx(mannwhitneyu(after, before).pvalue)
        agreed.append((shift.p_value <= 0.05) == (not shift.ratio.low <= 1 <= shift.ratio.high))
    assert all(agreed)
    assert first == 12 or len(agreed) > 30


def test_the_smallest_p_is_what_complete_order_gives() -> None:
    assert find_least_p(5, 7) == pytest.approx(mannwhitneyu(range(5), range(10, 17)).pvalue)
    assert find_shift([1.0, 1.1, 1.2], [2.0, 2.1, 2.2]).ratio.low is None


def test_holm_is_the_step_down_of_bonferroni() -> None:
    assert correct_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert correct_holm([0.9, 0.9]) == [1.0, 1.0]
    assert correct_holm([]) == []


def test_disorder_among_rounds_is_told() -> None:
    random = np.random.default_rng(3)
    noise = random.normal(0, 0.005, 20)
    assert find_disorder(np.exp(noise).tolist(), 0.03) == ""
    modes = np.exp(noise + 0.06 * (np.arange(20) % 3 == 0))
    assert find_disorder(modes.tolist(), 0.03).startswith("run at two speeds, ")
    assert find_two_speeds(np.log(modes).tolist()) == pytest.approx((0, 0.06), abs=0.005)
    trend = np.exp(noise + np.linspace(0, 0.05, 20))
    assert find_disorder(trend.tolist(), 0.03).startswith("drift by +")
    assert find_drift(np.log(trend).tolist()) == pytest.approx(0.05, abs=0.01)
    assert find_drift([1.0] * 20) == 0


def correlate(random: np.random.Generator, rho: float, shape: tuple[int, int]) -> NDArray[np.float64]:
    """An autoregression of order 1, standard deviation 1."""
    noise = random.standard_normal(shape)
    for place in range(1, shape[1]):
        noise[:, place] = rho * noise[:, place - 1] + np.sqrt(1 - rho**2) * noise[:, place]
    return noise


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_intervals_cover_where_rounds_hang_together(rho: float) -> None:
    covered = []
    for values in correlate(np.random.default_rng(5), rho, (1500, 20)):
        estimate = estimate_median(values.tolist())
        if estimate.low is not None and estimate.high is not None:
            covered.append(estimate.low <= 0 <= estimate.high)
    assert len(covered) > 1200
    assert np.mean(covered) >= 0.95 - 0.011  # two standard errors of the simulation


def test_few_rounds_do_not_tell_whether_they_hang_together() -> None:
    assert find_correlation([1.0, 2.0, 3.0, 4.0]) == 0
    assert find_correlation([float(place) for place in range(40)]) == 0.8
    assert find_correlation([1.0] * 20) == pytest.approx(1 / 20)


@pytest.mark.parametrize(("spread", "rounds"), [(0.01, 12), (0.02, 24)])
def test_words_err_no_more_than_they_say(spread: float, rounds: int) -> None:
    random, rule = np.random.default_rng(7), Rule()
    false = caught = covered = silent = 0
    runs = 300
    for _ in range(runs):
        before, after = random.lognormal(0, spread, (2, rounds))
        shift = find_shift(before.tolist(), after.tolist())
        if shift.ratio.low is None or shift.ratio.high is None:
            silent += 1  # these rounds seem to hang together too strongly for an interval
        else:
            covered += shift.ratio.low <= 1 <= shift.ratio.high
        false += shift.p_value <= rule.significance
        slower = find_shift(before.tolist(), (1.03 * after).tolist())
        caught += slower.p_value <= rule.significance and slower.ratio.value >= rule.line
    assert covered / (runs - silent) >= 0.95 - 0.025
    assert silent / runs <= 0.02
    assert false / runs <= 0.01 + 0.012
    assert caught / runs >= 0.9
