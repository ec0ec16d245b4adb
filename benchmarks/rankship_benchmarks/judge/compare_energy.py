"""Compare two runs' energies by the rules for times, only if the same meter read both in the same way.

The total of an inference is compared. The meter's gain error is the same in both runs and cancels; its random error is
part of the spread of rounds.
"""

from collections.abc import Iterable

from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.bundle.suite import EnergyPlan
from rankship_benchmarks.judge.compare import Rounds, Rule, Verdict, judge_runs, judge_unknown
from rankship_benchmarks.judge.energy_figures import name_meters, read_rounds
from rankship_benchmarks.judge.summary import group_trials
from rankship_benchmarks.judge.validity import keep_trusted, name_distrust
from rankship_pipeline.foundation.artifact_key import ArtifactKey


def compare_energies(baseline: Bundle, candidate: Bundle, rule: Rule | None = None) -> tuple[Verdict, ...]:
    """Judge the energy of every case that both runs metered; () if a run has no energy.

    compare_bundles has checked already that the two are comparable. If their meters differ, every case is unknown.
    """
    chosen, plans = rule or Rule(), (baseline.header.energy, candidate.header.energy)
    if plans[0] is None or plans[1] is None or not baseline.metered or not candidate.metered:
        return ()
    runs = _collect(baseline, plans[0]), _collect(candidate, plans[1])
    unlike = "; ".join(_name_differences(baseline, candidate))
    if unlike:
        keys = dict.fromkeys([*runs[0], *runs[1]])
        return tuple(judge_unknown(key, f"energy was measured differently: {unlike}", chosen, "energy") for key in keys)
    return judge_runs((baseline, candidate), runs, chosen, "energy")


def _collect(bundle: Bundle, plan: EnergyPlan) -> dict[ArtifactKey, Rounds]:
    """Collect each case's total by round, of the rounds that a verdict may use."""
    everything = [one.trial for one in bundle.metered]
    trusted = {id(trial) for trial in keep_trusted(everything)}
    read = read_rounds((one for one in bundle.metered if id(one.trial) in trusted), plan)
    found = {}
    for key, trials in group_trials(everything).items():
        rounds = read[key].rounds if key in read else {}
        reasons = [f"{reason} in {count}" for reason, count in name_distrust(trials, everything).items()]
        reasons += list(read[key].refused.values())[:1] if key in read else []
        found[key] = Rounds(values={one: rounds[one].total.value_nj for one in rounds}, distrust=", ".join(reasons))
    return found


def _name_differences(baseline: Bundle, candidate: Bundle) -> Iterable[str]:
    """Yield each difference in how the two runs measured energy."""
    before, after = (_describe(bundle) for bundle in (baseline, candidate))
    for name, value in before.items():
        if value != after[name]:
            yield f"{name} was {value}, is {after[name]}"


def _describe(bundle: Bundle) -> dict[str, str]:
    """Describe what must be the same in both runs."""
    plan = bundle.header.energy
    meters = ", ".join(f"{name} ({provenance})" for name, provenance in name_meters(bundle.metered))
    if plan is None:
        return {"meter": meters}
    rails = sorted({rail.name for one in bundle.metered for rail in one.trace.rails}) if not plan.rails else plan.rails
    return {
        "meter": meters,
        "rails": " + ".join(rails),
        "reading": f"every {plan.period_us} µs",
        "loop": f"{plan.choice.busy_ms} ms between rests of {plan.choice.idle_ms} ms",
    }
