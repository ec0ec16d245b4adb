"""Compare two runs of the same cases: a verdict for each, and the reason.

Rounds are compared, never inferences. Where both runs timed the same canary, each round is taken relative to its
canary, which cancels what slows everything (heat, another boot, a busy night). The interval of a ratio covers the
spread of rounds within these two runs and, through the canary, what moves a whole run; it does not cover a change from
run to run that affects one case alone. Only a history of nights shows that (stats/steps.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import log
from typing import Literal

from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.judge.comparability import refuse_unlike_runs
from rankship_benchmarks.judge.summary import group_trials, refuse_unlike
from rankship_benchmarks.judge.validity import keep_trusted, name_distrust
from rankship_benchmarks.stats.disorder import find_disorder
from rankship_benchmarks.stats.estimates import Estimate, median_by_round
from rankship_benchmarks.stats.shift import Shift, correct_holm, find_least_p, find_shift
from rankship_pipeline.foundation.artifact_key import VARIANTS, ArtifactKey
from rankship_pipeline.foundation.frozen import record
from rankship_targets.trials.trial import Trial

Outcome = Literal["better", "worse", "same", "unknown"]
Figure = Literal["time", "energy"]


@record
class Rule:
    """What counts as a change.

    `effect` is the smallest relative change that must be found (0.03: 3 %); the line between a change and none is half
    of it. `significance` is the probability of any false verdict over all cases of a comparison (Holm).
    """

    effect: float = 0.03
    significance: float = 0.01

    @property
    def line(self) -> float:
        """The ratio from which a significant change is worse; from its inverse down it is better."""
        return 1 + self.effect / 2


@record
class Verdict:
    """The verdict on one case; `ratio` is candidate over baseline in time or energy, so above 1 is worse.

    If `canary_ratio`, the canary's own ratio, is given, `ratio` is relative to the canary. `p_value` is the rank
    test's, adjusted for the number of cases; `threshold` is the effect that the rule looks for.
    """

    key: ArtifactKey
    verdict: Outcome
    reason: str
    ratio: Estimate | None
    p_value: float | None
    threshold: float
    canary_ratio: Estimate | None = None
    figure: Figure = "time"


@record
class Rounds:
    """One case in one run: the time or energy of each round that counts, in order, and why other rounds do not."""

    values: dict[int, float]
    distrust: str


def compare_bundles(
    baseline: Bundle, candidate: Bundle, rule: Rule | None = None, *, across: Iterable[str] = ()
) -> tuple[Verdict, ...]:
    """Judge every case of either run; UnlikeConditions if they must not be compared (see comparability.ASPECTS)."""
    for bundle in (baseline, candidate):
        refuse_unlike(bundle)
    refuse_unlike_runs(baseline, candidate, across=across)
    return judge_runs((baseline, candidate), (_collect_rounds(baseline), _collect_rounds(candidate)), rule or Rule())


def judge_runs(
    bundles: tuple[Bundle, Bundle],
    runs: tuple[Mapping[ArtifactKey, Rounds], Mapping[ArtifactKey, Rounds]],
    chosen: Rule,
    figure: Figure = "time",
) -> tuple[Verdict, ...]:
    """Judge every case of either run from its collected rounds."""
    keys = sorted({key for run in runs for key in run if key.variant in VARIANTS}, key=lambda key: key.order)
    canary = _compare_canaries(bundles, runs)
    refused = _refuse_canary(canary, chosen, figure)
    shifts: dict[ArtifactKey, Shift] = {}
    verdicts: dict[ArtifactKey, Verdict] = {}
    for key in keys:
        before, after = (_relate(run, key, with_canary=canary is not None) for run in runs)
        reason = refused or _refuse_rounds(before, after, len(keys), chosen)
        if not reason:
            shifts[key] = find_shift(list(before.values.values()), list(after.values.values()))
        else:
            verdicts[key] = judge_unknown(key, reason, chosen, figure)
    adjusted = correct_holm([shift.p_value for shift in shifts.values()])
    for (key, shift), p_value in zip(shifts.items(), adjusted, strict=True):
        verdicts[key] = _judge_shift(key, shift.ratio, p_value, chosen, figure)
    return tuple(replace(verdicts[key], canary_ratio=canary.ratio if canary else None) for key in keys)


def _collect_rounds(bundle: Bundle) -> dict[ArtifactKey, Rounds]:
    trusted = group_trials(keep_trusted(bundle.trials))
    return {
        key: Rounds(values=median_by_round(trusted.get(key, [])), distrust=_explain_distrust(trials, bundle.trials))
        for key, trials in group_trials(bundle.trials).items()
    }


def _explain_distrust(mine: list[Trial], everything: tuple[Trial, ...]) -> str:
    reasons = name_distrust(mine, everything)
    return ", ".join(f"{reason} in {count} of {len(mine)} rounds" for reason, count in reasons.items())


def _compare_canaries(bundles: tuple[Bundle, Bundle], runs: tuple[Mapping[ArtifactKey, Rounds], ...]) -> Shift | None:
    """Compare the canaries; None if a run has none, or they are not the same file."""
    files = {bundle.header.canary.sha256 if bundle.header.canary else "" for bundle in bundles}
    rounds = [[one for key, one in run.items() if key.variant == "canary"] for run in runs]
    if len(files) != 1 or not all(found and found[0].values for found in rounds):
        return None
    before, after = (list(found[0].values.values()) for found in rounds)
    return find_shift(before, after)


def _refuse_canary(canary: Shift | None, rule: Rule, figure: Figure) -> str:
    """Return why the canary forbids a verdict on any case; empty if it does not."""
    if canary is None or abs(log(canary.ratio.value)) <= log(1 + rule.effect):
        return ""
    moved = f"the canary itself took {canary.ratio.value:.3f} times {'as long' if figure == 'time' else 'the energy'}"
    return f"{moved}: the device changed between the runs by more than {rule.effect:.0%}"


def _relate(run: Mapping[ArtifactKey, Rounds], key: ArtifactKey, *, with_canary: bool) -> Rounds:
    """Return one case's rounds, relative to the canary in the same round if `with_canary`."""
    mine = run.get(key, Rounds(values={}, distrust="it was not measured"))
    if not with_canary:
        return mine
    canary = next(one.values for other, one in run.items() if other.variant == "canary")
    related = {number: time / canary[number] for number, time in mine.values.items() if number in canary}
    return Rounds(values=related, distrust=mine.distrust)


def _refuse_rounds(before: Rounds, after: Rounds, cases: int, rule: Rule) -> str:
    """Return why these rounds cannot be judged; empty if they can."""
    for name, run in (("baseline", before), ("candidate", after)):
        if len(run.values) < _FEWEST_ROUNDS:
            why = f": {run.distrust}" if run.distrust else ""
            return f"only {len(run.values)} rounds of the {name} count, at least {_FEWEST_ROUNDS} are needed{why}"
    if find_least_p(len(before.values), len(after.values)) * cases > rule.significance:
        needed = count_rounds_needed(cases, rule)
        counts = f"{len(before.values)} and {len(after.values)} rounds"
        return f"{counts} are too few to show any change in one of {cases} cases: {needed} each are needed"
    for name, run in (("baseline", before), ("candidate", after)):
        disorder = find_disorder(list(run.values.values()), rule.effect)
        if disorder:
            return f"the {name}'s rounds {disorder}"
    return ""


def count_rounds_needed(cases: int, rule: Rule | None = None) -> int:
    """Return how many rounds each run needs so that a change in one of `cases` cases can be significant at all."""
    level = (rule or Rule()).significance / cases
    count = _FEWEST_ROUNDS
    while find_least_p(count, count) > level:
        count += 1
    return count


_FEWEST_ROUNDS = 5


def _judge_shift(key: ArtifactKey, ratio: Estimate, p_value: float, rule: Rule, figure: Figure) -> Verdict:
    verdict, reason = choose_verdict(ratio, p_value, rule, figure)
    return Verdict(
        key=key,
        verdict=verdict,
        reason=reason,
        ratio=ratio,
        p_value=p_value,
        threshold=rule.effect,
        figure=figure,
    )


def choose_verdict(ratio: Estimate, p_value: float, rule: Rule, figure: Figure = "time") -> tuple[Outcome, str]:
    """Choose the verdict on a ratio and its p-value, adjusted for the number of cases; returns it with its reason."""
    change = f"{ratio.value - 1:+.1%}"
    sure = p_value <= rule.significance
    if sure and ratio.value >= rule.line:
        return "worse", f"{change} {figure}, and not by chance (p = {p_value:.2g} over all cases)"
    if sure and ratio.value <= 1 / rule.line:
        return "better", f"{change} {figure}, and not by chance (p = {p_value:.2g} over all cases)"
    if ratio.low is None or ratio.high is None:
        return "unknown", f"{ratio.rounds} rounds are too few for an interval"
    if ratio.low > 1 / (1 + rule.effect) and ratio.high < 1 + rule.effect:
        return "same", f"the interval lies within ± {rule.effect:.0%}"
    half = log(ratio.high / ratio.low) / 2
    wanted = max(ratio.rounds + 1, round(ratio.rounds * (half / log(rule.line)) ** 2))
    return (
        "unknown",
        f"{change}, too uncertain for an effect of {rule.effect:.0%}: about {wanted} rounds each would be enough",
    )


def judge_unknown(key: ArtifactKey, reason: str, rule: Rule, figure: Figure = "time") -> Verdict:
    """Make the verdict `unknown` on a case, with its reason."""
    return Verdict(
        key=key,
        verdict="unknown",
        reason=reason,
        ratio=None,
        p_value=None,
        threshold=rule.effect,
        figure=figure,
    )
