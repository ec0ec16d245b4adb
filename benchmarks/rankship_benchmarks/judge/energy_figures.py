"""Energy per inference of every artifact of a run, over its rounds, with every reason against a figure."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, sqrt
from statistics import fmean, stdev

from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.bundle.suite import FEWEST_ENERGY_ROUNDS, EnergyPlan
from rankship_benchmarks.judge.cautions import name_rounds
from rankship_benchmarks.judge.energy_round import Bounded, RoundEnergy, read_round
from rankship_benchmarks.judge.validity import judge_trial
from rankship_benchmarks.stats.estimates import CONFIDENCE, Estimate, estimate_ratio
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.errors import MeasurementError, TraceGap
from rankship_pipeline.foundation.frozen import record
from rankship_targets.trials.trace import Provenance
from rankship_targets.trials.trial import MeteredTrial

NOT_ASKED = "the suite asks for none"


@record
class EnergyEstimate:
    """Energy of one inference: the mean over rounds, and its uncertainty.

    `bound_nj` is the worst case of meter, calibration and drift between the rests; `spread_nj` is Student's 95 %
    half-width over rounds. The true value lies within their sum with that confidence.
    """

    value_nj: int
    bound_nj: int
    spread_nj: int
    rounds: int

    @property
    def uncertainty_nj(self) -> int:
        """The sum of `bound_nj` and `spread_nj`."""
        return self.bound_nj + self.spread_nj

    @property
    def interval(self) -> Estimate:
        """The value with its interval, in nJ."""
        low, high = self.value_nj - self.uncertainty_nj, self.value_nj + self.uncertainty_nj
        return Estimate(value=self.value_nj, low=low, high=high, confidence=CONFIDENCE, rounds=self.rounds)


@record
class CaseEnergy:
    """One artifact's energy; `refused` says why a figure is None, and which rounds do not count.

    `ratio` is compressed over dense in the same format and round, by totals (None for dense). `idle_uw` is the mean
    power of all rests, `idle_drift_uw` the largest difference between two rests of a trial; None if no round counts.
    """

    meter: str
    provenance: Provenance
    rails: tuple[str, ...]
    total: EnergyEstimate | None
    marginal: EnergyEstimate | None
    ratio: Estimate | None
    refused: tuple[str, ...]
    idle_uw: int | None
    idle_drift_uw: int | None
    calibration_ppm: int | None


@record
class CaseRounds:
    """One artifact's rounds that count, by number, and why others do not."""

    rounds: dict[int, RoundEnergy]
    refused: dict[int, str]


def read_rounds(metered: Iterable[MeteredTrial], plan: EnergyPlan) -> dict[ArtifactKey, CaseRounds]:
    """Read every metered trial; a trial that does not count is kept as its reason."""
    cases: dict[ArtifactKey, CaseRounds] = {}
    for one in sorted(metered, key=lambda one: one.trial.round):
        trial = one.trial
        mine = cases.setdefault(trial.key, CaseRounds(rounds={}, refused={}))
        read = read_trial(one, plan)
        if isinstance(read, str):
            mine.refused[trial.round] = read
        else:
            mine.rounds[trial.round] = read
    return cases


def read_trial(metered: MeteredTrial, plan: EnergyPlan) -> RoundEnergy | str:
    """Read one metered trial, or return why it does not count."""
    if reasons := judge_trial(metered.trial):
        return f"{', '.join(reasons)} while it was measured"
    try:
        return read_round(metered, plan)
    except TraceGap as gap:
        return f"trace gap: {gap}"
    except MeasurementError as failure:
        return str(failure)


def judge_energy(bundle: Bundle) -> dict[ArtifactKey, CaseEnergy]:
    """Compute each artifact's energy; empty if the suite asks for none, or none is measured yet."""
    plan = bundle.header.energy
    if plan is None:
        return {}
    cases = read_rounds(bundle.metered, plan)
    return {key: _judge(key, cases, bundle.metered, plan) for key in cases}


def name_meters(metered: Iterable[MeteredTrial]) -> list[tuple[str, Provenance]]:
    """List the meters that recorded these trials, with their provenance: normally one in a run."""
    return sorted({(one.trace.meter, one.trace.provenance) for one in metered})


def _judge(
    key: ArtifactKey, cases: Mapping[ArtifactKey, CaseRounds], metered: Sequence[MeteredTrial], plan: EnergyPlan
) -> CaseEnergy:
    mine, own = cases[key], [one for one in metered if one.trial.key == key]
    rounds = list(mine.rounds.values())
    refused = list(_name_refused(mine))
    meters = name_meters(metered)
    overlaps = [one for one in rounds if one.overlap]
    supported = len(rounds) >= FEWEST_ENERGY_ROUNDS and len(meters) == 1
    if len(meters) > 1:
        refused.append(f"more than one meter read this run: {', '.join(name for name, _ in meters)}")
    elif not supported:
        refused.append(f"{len(rounds)} rounds count, at least {FEWEST_ENERGY_ROUNDS} are needed")
    elif overlaps:
        refused.append(f"no marginal figure: in round {overlaps[0].round} {overlaps[0].overlap}")
    totals, dense = (_list_totals(cases.get(name)) for name in (key, key.dense))
    return CaseEnergy(
        meter=own[0].trace.meter,
        provenance=own[0].trace.provenance,
        rails=plan.rails or tuple(rail.name for rail in own[0].trace.rails),
        total=_estimate([one.total for one in rounds], plan) if supported else None,
        marginal=_estimate([one.marginal for one in rounds], plan) if supported and not overlaps else None,
        ratio=estimate_ratio(totals, dense) if supported and key.variant == "compressed" else None,
        refused=tuple(refused),
        idle_uw=round(fmean(one.idle_uw for one in rounds)) if rounds else None,
        idle_drift_uw=max((one.idle_drift_uw for one in rounds), default=None),
        calibration_ppm=plan.calibration_ppm,
    )


def _list_totals(mine: CaseRounds | None) -> dict[int, float]:
    return {number: one.total.value_nj for number, one in mine.rounds.items()} if mine else {}


def _name_refused(mine: CaseRounds) -> Iterable[str]:
    """Yield a phrase per kind of reason (the text before its colon), with the reason of the first such round."""
    rounds: dict[str, list[int]] = {}
    for number, reason in mine.refused.items():
        rounds.setdefault(reason.partition(":")[0], []).append(number)
    for numbers in rounds.values():
        yield f"{name_rounds(numbers)} not counted: {mine.refused[numbers[0]]}"


def _estimate(rounds: Sequence[Bounded], plan: EnergyPlan) -> EnergyEstimate:
    """Return the mean over rounds, with the largest bound and Student's half-width."""
    from scipy.stats import t

    values, gain = [one.value_nj for one in rounds], (plan.calibration_ppm or 0) / 1e6
    return EnergyEstimate(
        value_nj=round(fmean(values)),
        bound_nj=ceil(max(one.bound_nj + abs(one.value_nj) * gain for one in rounds)),
        spread_nj=ceil(float(t.isf((1 - CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / sqrt(len(values))),
        rounds=len(values),
    )
