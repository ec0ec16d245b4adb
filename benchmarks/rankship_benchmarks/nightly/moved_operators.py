"""Which operators' profiled times moved between two runs: profiles are matched in running order, by kind."""

from difflib import SequenceMatcher
from pathlib import Path
from statistics import median, quantiles

from rankship_benchmarks.judge.changes import OperatorMove
from rankship_benchmarks.measure.profiles import Profile, read_profiles
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.units import show_ns
from rankship_targets.trials.events import OperatorTime

_LEAST = 0.02  # of all operators' time
_MOST_SHOWN = 6


def find_moves(before: Path, after: Path, key: ArtifactKey) -> tuple[tuple[OperatorMove, ...], str]:
    """Return the operators of one case that moved between two runs' folders, or else why none is named."""
    early, late = (_find_profile(folder, key) for folder in (before, after))
    missing = [folder.name for folder, one in ((before, early), (after, late)) if one is None]
    if early is None or late is None:
        return (), f"no profile of this case in {' and '.join(missing)}"
    moves = compare_profiles(early, late)
    total = f"{show_ns(early.operators_ns)} → {show_ns(late.operators_ns)}"
    return moves, "" if moves else f"no single operator's time moved; all together took {total}"


def compare_profiles(before: Profile, after: Profile) -> tuple[OperatorMove, ...]:
    """List the operators that moved, came or went, the largest gain or loss first, at most six.

    An operator moved if the middle halves of its times do not overlap. Less than 2 % of all operators' time is
    left out: a profile is one process. Two different files are matched in running order by the operators' kinds,
    because runtimes number operators anew in every file.
    """
    moves = []
    for early, late in _match(before, after):
        if early is None or late is None or _is_apart(early, late):
            sides = [None if one is None else round(median(one.ns)) for one in (early, late)]
            known = late or early
            if known is not None:
                moves.append(OperatorMove(name=known.name, kind=known.kind, before_ns=sides[0], after_ns=sides[1]))
    grave = [one for one in moves if abs(one.gained_ns) >= _LEAST * max(before.operators_ns, 1)]
    return tuple(sorted(grave, key=lambda one: -abs(one.gained_ns))[:_MOST_SHOWN])


def _match(before: Profile, after: Profile) -> list[tuple[OperatorTime | None, OperatorTime | None]]:
    """Pair the operators of two profiles; None stands for one that the other file does not have."""
    same = before.artifact_sha256 == after.artifact_sha256
    first_words, second_words = (
        [f"{one.name} {one.kind}" if same else one.kind for one in each.operators] for each in (before, after)
    )
    pairs: list[tuple[OperatorTime | None, OperatorTime | None]] = []
    matched = SequenceMatcher(None, first_words, second_words, autojunk=False)
    for word, first, last, second, end in matched.get_opcodes():
        early, late = before.operators[first:last], after.operators[second:end]
        if word == "equal":
            pairs += zip(early, late, strict=True)
        else:
            pairs += [(one, None) for one in early] + [(None, one) for one in late]
    return pairs


def _is_apart(early: OperatorTime, late: OperatorTime) -> bool:
    """Whether the middle halves of two operators' times do not overlap."""
    (low, _, high), (other_low, _, other_high) = (_read_quartiles(one) for one in (early, late))
    return low > other_high or other_low > high


def _read_quartiles(one: OperatorTime) -> list[float]:
    return quantiles(one.ns, n=4, method="inclusive") if len(one.ns) > 1 else [float(median(one.ns))] * 3


def _find_profile(folder: Path, key: ArtifactKey) -> Profile | None:
    found = read_profiles(folder)
    return next((one for one in found.profiles if one.key == key), None) if found else None
