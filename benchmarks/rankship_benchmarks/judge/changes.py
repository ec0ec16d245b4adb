"""What differs between two runs for one case, from the runs' own records: the file, what made it, and the device.

Only what differs is listed, the likeliest cause first. Two facts decide the order. A file that is the same byte for
byte rules out everything that makes files. If the file is another one, the run's other cases tell: where files that
stayed the same are worse too, the device comes first, else the file.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from statistics import median
from typing import Literal

from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.judge.comparability import find_differences
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.delegates import find_facts
from rankship_pipeline.foundation.formats import FORMATS
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Artifact, RankPlan, TensorSpec
from rankship_pipeline.foundation.units import show_bytes, show_celsius, show_ns
from rankship_targets.trials.trial import DeviceState, Trial

About = Literal["file", "device"]  # what a change belongs to
NONE = "none"
_SHOWN_HASH = 12
_MOST_LAYERS = 8
_WARMER_MC = 5_000
_CLOCK_MOVE, _MEMORY_MOVE = 0.02, 0.25  # as shares
_LOAD_MOVE = 1_000  # thousandths of a process


@record
class Change:
    """One thing that differs between two runs, with its value in each; `what` names it."""

    about: About
    what: str
    before: str
    after: str

    def __str__(self) -> str:
        """Return the change as a phrase."""
        return f"{self.what}: {self.before} → {self.after}"


@record
class OperatorMove:
    """One operator of two profiles whose time differs, in ns of one inference; None where a profile lacks it.

    `name` and `kind` are the runtime's own words.
    """

    name: str
    kind: str
    before_ns: int | None
    after_ns: int | None

    @property
    def gained_ns(self) -> int:
        """How much longer it takes."""
        return (self.after_ns or 0) - (self.before_ns or 0)


@record
class Explanation:
    """What may have changed one case between the runs `baseline` and `candidate`, the likeliest cause first.

    `finding` says in one sentence where to look. `operators` are those whose profiled time moved, `no_operators` says
    why there are none. `commits` are those of the user's repository between the nights, newest first.
    """

    baseline: str
    candidate: str
    finding: str
    changes: tuple[Change, ...]
    operators: tuple[OperatorMove, ...] = ()
    no_operators: str = ""
    commits: tuple[str, ...] = ()


def explain_case(
    baseline: Bundle, candidate: Bundle, key: ArtifactKey, outcomes: Mapping[ArtifactKey, str]
) -> Explanation:
    """List what differs for one case; `outcomes` are the verdicts on all cases of the same two runs."""
    finding, changes = _find_changes(baseline, candidate, key, outcomes)
    return Explanation(
        baseline=baseline.header.run_id, candidate=candidate.header.run_id, finding=finding, changes=changes
    )


def _find_changes(
    baseline: Bundle, candidate: Bundle, key: ArtifactKey, outcomes: Mapping[ArtifactKey, str]
) -> tuple[str, tuple[Change, ...]]:
    """Return where to look, and every change in the order that follows from it."""
    before, after = _find_artifact(baseline, key), _find_artifact(candidate, key)
    device = list_device_changes(baseline, candidate, key)
    if before is None or after is None:
        return "One of the two runs does not have this file.", device
    if before.sha256 == after.sha256:
        return _judge_same_file(device), device
    file = list_file_changes(baseline.header.build.plan, before, candidate.header.build.plan, after)
    kept = [one for one in outcomes if one != key and _is_kept(baseline, candidate, one)]
    moved = sum(outcomes[one] == "worse" for one in kept)
    if moved:
        told = f"{moved} of {len(kept)} files that stayed the same are worse too"
        return f"The file is another one, but {told}: look at the device first.", (*device, *file)
    others = f", and {len(kept)} that stayed the same are not worse" if kept else ""
    return f"The file is another one{others}: look at what made it first.", (*file, *device)


def list_file_changes(
    plan_before: RankPlan, before: Artifact, plan_after: RankPlan, after: Artifact
) -> tuple[Change, ...]:
    """List what differs in two files and in what made them, the direct causes before their consequences."""
    causes = [
        *_list_tensors(before, after),
        *(_list_layers(plan_before, plan_after) if after.key.variant == "compressed" else ()),
        *_compare("file", "recipe", {"": before.recipe_sha256}, {"": after.recipe_sha256}, _shorten),
        *_compare("file", "weights or code of", before.source_sha256, after.source_sha256, _shorten),
        *_compare("file", "package", before.toolchain, after.toolchain),
    ]
    if not causes:
        hashes = _shorten(before.sha256), _shorten(after.sha256)
        what = "contents of the file, though recipe, models, layers and packages are the same"
        causes.append(Change(about="file", what=what, before=hashes[0], after=hashes[1]))
    sizes = {"parameters": (f"{before.parameters:,}", f"{after.parameters:,}")}
    sizes["size"] = show_bytes(before.size_bytes), show_bytes(after.size_bytes)
    told = [
        Change(about="file", what=what, before=early, after=late)
        for what, (early, late) in sizes.items()
        if early != late
    ]
    return (*causes, *told)


def list_device_changes(baseline: Bundle, candidate: Bundle, key: ArtifactKey) -> tuple[Change, ...]:
    """List what differs in the device: what changes times by itself, then its state in this case's trials, the rest."""
    others = [name for name in FORMATS if name != key.format]
    skipped = {f"{name} {what}" for name in others for what in ("runtime", "process", "binary")}
    found = [one for one in find_differences(baseline, candidate) if one.aspect not in skipped]
    forbid, caution = (
        [
            Change(about="device", what=one.aspect, before=one.baseline, after=one.candidate)
            for one in found
            if one.weight == weight
        ]
        for weight in ("forbids", "cautions")
    )
    mine = [[trial for trial in bundle.trials if trial.key == key] for bundle in (baseline, candidate)]
    return (*forbid, *_list_taken(baseline, candidate, key), *_list_states(*mine), *caution)


def _list_taken(baseline: Bundle, candidate: Bundle, key: ArtifactKey) -> Iterator[Change]:
    """Yield what the case's delegate takes of its file, where both runs know it and it differs."""
    looked = [next((one for one in run.header.delegated if one.key == key), None) for run in (baseline, candidate)]
    before, after = (None if one is None else str(one) for one in looked)
    if before is not None and after is not None and before != after:
        yield Change(about="device", what=f"what {find_facts(key).title} takes", before=before, after=after)


def _judge_same_file(device: tuple[Change, ...]) -> str:
    same = "The file is the same, byte for byte"
    if device:
        return f"{same}: nothing that makes files is the cause; look at the device."
    return f"{same}, and no condition on record differs: the cause is not on record (firmware, heat, other work)."


def _find_artifact(bundle: Bundle, key: ArtifactKey) -> Artifact | None:
    """Find the file of a case, also of one that times a phase of it."""
    return next((one for one in bundle.header.build.artifacts if one.key == key.exported), None)


def _is_kept(baseline: Bundle, candidate: Bundle, key: ArtifactKey) -> bool:
    before, after = _find_artifact(baseline, key), _find_artifact(candidate, key)
    return before is not None and after is not None and before.sha256 == after.sha256


def _list_layers(before: RankPlan, after: RankPlan) -> list[Change]:
    """List layers that are stored otherwise, those with the largest difference in parameters first."""
    early, late = ({one.name: one for one in plan.layers} for plan in (before, after))
    moved = []
    for name in dict.fromkeys(chain(early, late)):
        one, other = early.get(name), late.get(name)
        texts = str(one.stored) if one else NONE, str(other.stored) if other else NONE
        if texts[0] != texts[1]:
            gained = (other.chosen_parameters if other else 0) - (one.chosen_parameters if one else 0)
            change = Change(about="file", what=f"layer {name}", before=texts[0], after=texts[1])
            moved.append((abs(gained), change))
    ordered = [change for _, change in sorted(moved, key=lambda pair: -pair[0])]
    rest = len(ordered) - _MOST_LAYERS
    if rest <= 0:
        return ordered
    more = Change(about="file", what=f"{rest} more layers", before="stored so", after="stored otherwise")
    return [*ordered[:_MOST_LAYERS], more]


def _list_tensors(before: Artifact, after: Artifact) -> Iterator[Change]:
    for what, early, late in (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs)):
        first, second = ({one.name: _show_tensor(one) for one in specs} for specs in (early, late))
        yield from _compare("file", what, first, second)


def _show_tensor(spec: TensorSpec) -> str:
    sides = ("×".join(str(one if isinstance(one, int) else f"{one.low}–{one.high}") for one in spec.shape)) or "scalar"
    return f"{spec.dtype} {sides}"


def _compare(
    about: About, what: str, before: Mapping[str, str], after: Mapping[str, str], show: Callable[[str], str] = str
) -> Iterator[Change]:
    for name in dict.fromkeys(chain(before, after)):
        early, late = before.get(name), after.get(name)
        if early != late:
            texts = [NONE if one is None else show(one) for one in (early, late)]
            yield Change(about=about, what=f"{what} {name}".strip(), before=texts[0], after=texts[1])


def _list_states(before: list[Trial], after: list[Trial]) -> Iterator[Change]:
    """Yield each reading whose median over a case's trials differs by more than it does from day to day."""
    for what, (read, differs, show) in _STATES.items():
        early, late = (_take_middle(trials, read) for trials in (before, after))
        if early is not None and late is not None and differs(early, late):
            yield Change(about="device", what=what, before=show(early), after=show(late))


def _take_middle(trials: list[Trial], read: Callable[[DeviceState], float | None]) -> float | None:
    known = [value for trial in trials if (value := read(trial.before)) is not None]
    return median(known) if known else None


def _read_clock(state: DeviceState) -> float | None:
    return max(state.frequency_khz) if state.frequency_khz else None


def _shorten(sha256: str) -> str:
    return sha256[:_SHOWN_HASH]


def _by_share(share: float) -> Callable[[float, float], bool]:
    return lambda early, late: abs(late - early) > share * max(early, 1)


def _by(least: float) -> Callable[[float, float], bool]:
    return lambda early, late: abs(late - early) >= least


# what is shown → how a state before a trial has it, whether two medians differ, and how one is shown
_STATES: dict[
    str, tuple[Callable[[DeviceState], float | None], Callable[[float, float], bool], Callable[[float], str]]
] = {
    "clock": (_read_clock, _by_share(_CLOCK_MOVE), lambda khz: f"{khz / 1000:,.0f} MHz"),
    "temperature": (lambda one: one.temperature_mc, _by(_WARMER_MC), lambda mc: show_celsius(round(mc))),
    "load": (lambda one: one.load_1m_milli, _by(_LOAD_MOVE), lambda milli: f"{milli / 1000:.1f}"),
    "free memory": (
        lambda one: one.available_memory_bytes,
        _by_share(_MEMORY_MOVE),
        lambda size: show_bytes(int(size)),
    ),
}


def show_move(move: OperatorMove) -> str:
    """Show an operator's move: "relu_nchwc Conv: 120 µs → 140 µs", or that it is new or gone."""
    name = f"{move.name} {move.kind}"
    if move.before_ns is None:
        return f"{name}: new, {show_ns(move.after_ns or 0)}"
    if move.after_ns is None:
        return f"{name}: gone, was {show_ns(move.before_ns)}"
    return f"{name}: {show_ns(move.before_ns)} → {show_ns(move.after_ns)}"


def list_words(why: Explanation) -> list[str]:
    """List an explanation as sentences and phrases, for the terminal and pages."""
    words = [why.finding, *map(str, why.changes)]
    words += [f"profiled: {show_move(one)}" for one in why.operators]
    words += [f"profiled: {why.no_operators}"] if why.no_operators else []
    return [*words, *(f"commit {one}" for one in why.commits)]
