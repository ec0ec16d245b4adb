"""The summary of a bundle of trials: one result per artifact, and every reason to distrust it."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from rankship_benchmarks.bundle.bundle import Bundle, Header, find_cases
from rankship_benchmarks.bundle.delegated import Delegated
from rankship_benchmarks.judge.cautions import CautionGroup, group_cautions, name_rounds
from rankship_benchmarks.judge.energy_figures import NOT_ASKED, CaseEnergy, judge_energy
from rankship_benchmarks.judge.validity import keep_valid, refuse_trials
from rankship_benchmarks.stats.estimates import (
    Estimate,
    estimate_median,
    estimate_ratio,
    median_by_round,
    percentile_bound,
    relative_drift,
)
from rankship_pipeline.foundation.artifact_key import ArtifactKey, Precision, Variant
from rankship_pipeline.foundation.errors import MeasurementError, UnlikeConditions
from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quality import Score
from rankship_pipeline.foundation.records import Artifact, Build, LayerRank, Verified
from rankship_targets.trials.aggregate import Aggregate
from rankship_targets.trials.trial import RuntimeReading, Trial

# Limits that make a factored layer suspect when the compressed model is not faster.
_NEAR_BREAK_EVEN = 0.6
_NARROW_ROWS = 32
_TENTHS = 10  # the parts of a trial whose first and last show how a long generation slows down

TIMES = "\u00d7"


@record
class Result:
    """One artifact on one device, or one phase of an artifact that generates.

    Times are medians over rounds of each round's median; `cold_ns` is the first inference after loading. `ratio` is
    compressed over dense in the same format and round (None for dense). `p90_ns` and `p99_ns` are a typical round's
    95 % upper bound on that percentile, None where a round has too few samples for one. `model_rss_bytes` is the
    peak less the runtime's own memory; both memory figures are the largest over rounds. `parity` is the host's proof,
    `device_parity` that of the device's own runtime (None: not compared there, or the device is the host). `drift` is
    how much longer, as a share, a token took in the last tenth of a trial than in the first (None for all else).
    `delegated` is what its delegate takes of it (None: it has none, or nothing tells).
    """

    key: ArtifactKey
    size_bytes: int
    parameters: int
    accuracy: Score | None
    latency_ns: Estimate
    ratio: Estimate | None
    p90_ns: Estimate | None
    p99_ns: Estimate | None
    load_ns: Estimate
    cold_ns: Estimate | None
    peak_rss_bytes: int | None
    model_rss_bytes: int | None
    warmed_up: bool
    fewest_samples: int
    most_samples: int
    retries: int
    parity: Verified | None
    device_parity: Verified | None
    energy: CaseEnergy | None
    drift: Estimate | None = None
    delegated: Delegated | None = None

    @property
    def tokens_per_second(self) -> Estimate | None:
        """The tokens of a second: of a prompt that is read, or of a text that is made; None for all else."""
        if self.key.phase is None:
            return None
        time, tokens = self.latency_ns, 1e9 * (self.key.prompt_tokens or 1)
        low, high = (None if end is None else tokens / end for end in (time.high, time.low))
        return replace(time, value=tokens / time.value, low=low, high=high)


@record
class Summary:
    """A run's results, its cautions, and where compression did not make it faster.

    `energy_note` says why there is no energy at all; empty if there is some. `slower_notes` has one sentence for
    every format whose ratio is not shown to be below 1. `aggregates` are figures without samples, of which no result
    and no verdict is made.
    """

    header: Header
    finished: bool
    results: tuple[Result, ...]
    caution_groups: tuple[CautionGroup, ...]
    slower_notes: tuple[str, ...]
    energy_note: str
    threads: int
    agent_sha256: str
    runtimes: dict[Format, RuntimeReading]
    aggregates: tuple[Aggregate, ...] = ()

    @property
    def cautions(self) -> tuple[str, ...]:
        """Every reason to distrust the run, in full."""
        return tuple(caution for group in self.caution_groups for caution in group.cautions)


def summarise(bundle: Bundle) -> Summary:
    """Summarise a run; MeasurementError if no trial counts, UnlikeConditions if trials ran under different conditions.

    Trials that do not count (see validity.py) are left out of every figure; the cautions name them.
    """
    trials = bundle.trials
    empty = [f"round {one.round} of {one.key.title}" for one in trials if not one.samples_ns]
    if not trials or empty:
        what = f"no samples in {', '.join(empty)}" if empty else "no trial was taken"
        raise MeasurementError(f"run {bundle.header.run_id}: {what}", hint="measure first: `rankship bench`")
    refuse_unlike(bundle)
    valid = keep_valid(trials)
    groups = group_trials(valid)
    if not groups:
        raise refuse_trials(bundle.header.run_id, trials)
    energies = judge_energy(bundle)
    cases = sorted(find_cases(bundle).values(), key=lambda one: one.key.order)
    results = tuple(_judge(bundle, groups, case, energies) for case in cases if case.key in groups)
    return Summary(
        header=bundle.header,
        finished=bundle.finished,
        results=results,
        caution_groups=group_cautions(bundle, groups),
        slower_notes=tuple(_explain_slower(bundle.header.build, results)),
        energy_note="" if energies else NOT_ASKED if bundle.header.energy is None else "its trials have not run yet",
        threads=trials[0].threads,
        agent_sha256=trials[0].agent_sha256,
        aggregates=bundle.aggregates,
        runtimes={format_: runtime for format_ in FORMATS for runtime in _runtimes(valid, format_)[:1]},
    )


def group_trials(trials: Iterable[Trial]) -> dict[ArtifactKey, list[Trial]]:
    """Group trials by artifact, each group in the order of rounds."""
    groups: dict[ArtifactKey, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: trial.round):
        groups.setdefault(trial.key, []).append(trial)
    return groups


def refuse_unlike(bundle: Bundle) -> None:
    """Raise UnlikeConditions, naming the difference, if trials of a run were taken under different conditions."""
    trials, header = (*bundle.trials, *(one.trial for one in bundle.metered)), bundle.header
    made = (*header.build.artifacts, *([header.canary] if header.canary else []))
    known = {one.key: one.sha256 for one in made}
    for trial in trials:
        if known.get(trial.key.exported) != trial.artifact_sha256:
            what = f"round {trial.round} of {trial.key.title} timed {trial.artifact_sha256[:12]}"
            raise UnlikeConditions(f"run {header.run_id}: {what}, which this build did not make", hint=_UNLIKE)
        if trial.device != header.device:
            what = f"round {trial.round} ran on {trial.device!r}, the run is for {header.device!r}"
            raise UnlikeConditions(f"run {header.run_id}: {what}", hint=_UNLIKE)
    _refuse_mixed(header.run_id, "thread count", trials, lambda trial: str(trial.threads))
    _refuse_mixed(header.run_id, "agent", trials, lambda trial: trial.agent_sha256[:12])
    for format_ in FORMATS:
        same = [trial for trial in trials if trial.key.format == format_]
        _refuse_mixed(header.run_id, f"{format_} runtime", same, lambda trial: _describe(trial.runtime))


_UNLIKE = "measure again in one run, with nothing changed meanwhile"


def _refuse_mixed(run_id: str, what: str, trials: Iterable[Trial], read: Callable[[Trial], str]) -> None:
    rounds: dict[str, set[int]] = {}
    for trial in trials:
        rounds.setdefault(read(trial), set()).add(trial.round)
    if len(rounds) > 1:
        seen = "; ".join(f"{value} in {name_rounds(numbers)}" for value, numbers in rounds.items())
        raise UnlikeConditions(f"run {run_id}: the {what} differs between trials: {seen}", hint=_UNLIKE)


def _describe(runtime: RuntimeReading) -> str:
    where = f"Python {runtime.python}, {runtime.machine}, kernel {runtime.kernel}"
    identity = filter(None, (runtime.process, (runtime.binary_sha256 or "")[:12]))
    return ", ".join([f"{runtime.name} {runtime.version}", where, *identity])


def _runtimes(trials: Iterable[Trial], format_: Format) -> list[RuntimeReading]:
    return [trial.runtime for trial in trials if trial.key.format == format_]


def _judge(
    bundle: Bundle,
    groups: dict[ArtifactKey, list[Trial]],
    artifact: Artifact,
    energies: dict[ArtifactKey, CaseEnergy],
) -> Result:
    trials = groups[artifact.key]
    here = bundle.header.list_proofs()[0]
    medians = median_by_round(trials)
    dense = median_by_round(groups.get(artifact.key.dense, []))
    cold = [trial.warmup_ns[0] for trial in trials if trial.warmup_ns]
    peaks = [trial.peak_rss_bytes for trial in trials if trial.peak_rss_bytes is not None]
    own = [
        trial.peak_rss_bytes - trial.runtime_rss_bytes
        for trial in trials
        if trial.peak_rss_bytes is not None and trial.runtime_rss_bytes is not None
    ]
    return Result(
        key=artifact.key,
        size_bytes=artifact.size_bytes,
        parameters=artifact.parameters,
        accuracy=find_accuracy(bundle.header.build, artifact.key.variant, artifact.key.precision),
        latency_ns=estimate_median(list(medians.values())),
        ratio=estimate_ratio(medians, dense) if artifact.key.variant == "compressed" else None,
        p90_ns=_bound(trials, 0.90),
        p99_ns=_bound(trials, 0.99),
        load_ns=estimate_median([trial.load_ns for trial in trials]),
        cold_ns=estimate_median(cold) if cold else None,
        peak_rss_bytes=max(peaks, default=None),
        model_rss_bytes=max(own, default=None),
        warmed_up=all(trial.warmed_up for trial in trials),
        fewest_samples=min(len(trial.samples_ns) for trial in trials),
        most_samples=max(len(trial.samples_ns) for trial in trials),
        retries=sum(trial.retries for trial in trials),
        parity=_find_proof(here, artifact) or _find_proof(here, replace(artifact, key=artifact.key.exported)),
        device_parity=_find_proof(bundle.header.verified_on_device, artifact),
        delegated=next((one for one in bundle.header.delegated if one.key == artifact.key), None),
        energy=energies.get(artifact.key),
        drift=_measure_drift(trials) if artifact.key.phase == "decode" else None,
    )


def _measure_drift(trials: list[Trial]) -> Estimate | None:
    drifts = [relative_drift(trial.samples_ns, _TENTHS) for trial in trials if len(trial.samples_ns) >= _TENTHS]
    return estimate_median(drifts) if drifts else None


def _find_proof(proofs: Iterable[Verified], artifact: Artifact) -> Verified | None:
    """Find the proof of a file as this case's delegate computes it; one of another precision has another file."""
    same = (one for one in proofs if one.artifact_sha256 == artifact.sha256)
    return next((one for one in same if one.key.delegate == artifact.key.delegate), None)


def find_accuracy(build: Build, variant: Variant, precision: Precision = "float32") -> Score | None:
    """Find the accuracy of the torch model behind a variant; dense is the merged model, or the only source."""
    stages = {one.stage: one for one in build.accuracies}
    if precision != "float32":
        return stages.get(precision)
    if variant == "compressed":
        return stages.get("refined") or stages.get("compressed")
    sources = [one for stage, one in stages.items() if stage.startswith("source:")]
    return stages.get("merged") or stages.get("dense") or (sources[0] if len(sources) == 1 else None)


def _bound(trials: list[Trial], share: float) -> Estimate | None:
    bounds = [percentile_bound(trial.samples_ns, share) for trial in trials]
    known = [bound for bound in bounds if bound is not None]
    return estimate_median(known) if len(known) == len(bounds) else None


def _explain_slower(build: Build, results: tuple[Result, ...]) -> Iterable[str]:
    """Yield a sentence for every format in which compression is not shown to be faster, with the layers to suspect."""
    suspects = ", ".join(filter(None, map(_suspect, build.plan.layers)))
    blame = (
        f"layers most likely to blame: {suspects}"
        if suspects
        else "no factored layer stands out, so suspect the cost of the second operator in each of them"
    )
    for one in results:
        if one.ratio is None or (one.ratio.high is not None and one.ratio.high < 1):
            continue
        span = f" [{one.ratio.low:.2f}, {one.ratio.high:.2f}]" if one.ratio.low and one.ratio.high else ""
        if one.ratio.high is None and one.ratio.value < 1:
            why = f"{one.ratio.rounds} rounds are too few for an interval"
            yield f"compressed is not shown to be faster in {one.key.way} ({TIMES} {one.ratio.value:.2f}, {why})"
        else:
            yield f"compressed is not faster in {one.key.way} ({TIMES} {one.ratio.value:.2f}{span}); {blame}"


def _suspect(layer: LayerRank) -> str:
    """Return why a factored layer may cost time instead of saving it; empty if it is no suspect."""
    if layer.factors is None:
        return ""
    kept = layer.chosen_parameters / layer.dense_parameters
    reasons = []
    if kept > _NEAR_BREAK_EVEN:
        reasons.append(f"{layer.factors} keeps {kept:.0%} of its parameters")
    if layer.rows <= _NARROW_ROWS:
        reasons.append(f"only {layer.rows} rows")
    return f"{layer.name} ({', '.join(reasons)})" if reasons else ""
