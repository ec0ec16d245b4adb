"""The conditions that two runs must share to be compared: a table of aspects, and what a difference in each means."""

from collections.abc import Callable, Iterable
from typing import Literal

from rankship_benchmarks.bundle.bundle import TIMED_TOKENS, Bundle
from rankship_pipeline.foundation.errors import InputError, UnlikeConditions
from rankship_pipeline.foundation.formats import FORMATS
from rankship_pipeline.foundation.frozen import record
from rankship_targets.trials.trial import RuntimeReading, Trial

Weight = Literal["forbids", "cautions"]  # no comparison at all; a comparison with a caution


@record
class Difference:
    """One aspect in which two runs differ, with the value of each."""

    aspect: str
    weight: Weight
    baseline: str
    candidate: str

    def __str__(self) -> str:
        """Return the difference as a phrase."""
        return f"{self.aspect} was {self.baseline}, is {self.candidate}"


def _read_condition(name: str) -> Callable[[Bundle], str | None]:
    return lambda bundle: bundle.header.conditions.get(name)


def _read_trials(read: Callable[[Trial], object]) -> Callable[[Bundle], str | None]:
    def join(bundle: Bundle) -> str | None:
        seen = {read(trial) for trial in bundle.trials} - {None}
        return ", ".join(sorted(map(str, seen))) or None

    return join


def _read_runtime(name: str) -> Callable[[Bundle], str | None]:
    def read(trial: Trial) -> str | None:
        return f"{trial.runtime.name} {trial.runtime.version}" if trial.key.format == name else None

    return _read_trials(read)


def _read_of(name: str, read: Callable[[RuntimeReading], str | None]) -> Callable[[Bundle], str | None]:
    return _read_trials(lambda trial: read(trial.runtime) if trial.key.format == name else None)


def _name_binary(runtime: RuntimeReading) -> str | None:
    return (
        None if runtime.binary_sha256 is None else ", ".join(filter(None, (runtime.binary_sha256[:12], runtime.build)))
    )


# aspect → the function that reads it (None: unknown, which is no difference), and what a difference means: aspects that
# change the time of an inference by themselves forbid, those that may change it, or only name the software, caution.
ASPECTS: dict[str, tuple[Callable[[Bundle], str | None], Weight]] = {
    "device": (lambda bundle: bundle.header.device, "forbids"),
    "processor": (_read_condition("processor"), "forbids"),
    "architecture": (_read_condition("architecture"), "forbids"),
    "cores": (_read_condition("cores"), "forbids"),
    "threads": (_read_trials(lambda trial: trial.threads), "forbids"),
    "affinity": (_read_trials(lambda trial: trial.conditions.cpus), "forbids"),
    "governor": (_read_trials(lambda trial: trial.before.governor), "forbids"),
    "timed loop": (_read_condition("timed loop"), "forbids"),
    TIMED_TOKENS: (_read_condition(TIMED_TOKENS), "forbids"),
    "agent": (_read_trials(lambda trial: trial.agent_sha256[:12]), "forbids"),
    **{f"{name} runtime": (_read_runtime(name), "forbids") for name in FORMATS},
    **{f"{name} process": (_read_of(name, lambda one: one.process), "forbids") for name in FORMATS},
    **{f"{name} binary": (_read_of(name, _name_binary), "forbids") for name in FORMATS},
    "unmet": (_read_trials(lambda trial: "; ".join(trial.conditions.unmet) or "nothing"), "cautions"),
    "kernel": (_read_condition("kernel"), "cautions"),
    "python": (_read_condition("python"), "cautions"),
    "memory": (_read_condition("memory"), "cautions"),
    "charging": (_read_trials(lambda trial: trial.before.charging), "cautions"),
    "rankship": (lambda bundle: bundle.header.rankship_version, "cautions"),
}


def find_differences(baseline: Bundle, candidate: Bundle) -> tuple[Difference, ...]:
    """List every aspect that is known of both runs and differs, in the table's order."""
    found = []
    for aspect, (read, weight) in ASPECTS.items():
        before, after = read(baseline), read(candidate)
        if before is not None and after is not None and before != after:
            found.append(Difference(aspect=aspect, weight=weight, baseline=before, candidate=after))
    return tuple(found)


def refuse_unlike_runs(baseline: Bundle, candidate: Bundle, *, across: Iterable[str] = ()) -> tuple[Difference, ...]:
    """Raise UnlikeConditions naming every difference that forbids a comparison; returns those that only caution.

    `across` names aspects that may differ because they are what is compared: a new runtime, another governor.
    """
    wanted = set(across)
    unknown = sorted(wanted - set(ASPECTS))
    if unknown:
        raise InputError(f"no aspect is called {', '.join(unknown)}", hint=f"one of: {', '.join(ASPECTS)}")
    differences = find_differences(baseline, candidate)
    grave = [one for one in differences if one.weight == "forbids" and one.aspect not in wanted]
    if grave:
        runs = f"{baseline.header.run_id} and {candidate.header.run_id}"
        hint = "measure both again under the same conditions, or allow one difference with `--across ASPECT`"
        raise UnlikeConditions(f"runs {runs} must not be compared: {'; '.join(map(str, grave))}", hint=hint)
    return tuple(one for one in differences if one not in grave)
