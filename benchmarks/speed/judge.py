"""Compares two files of figures of one machine: which subjects became slower or larger by more than their noise."""

from collections.abc import Collection, Iterator
from typing import Literal

from rankship_benchmarks.stats.shift import correct_holm, find_least_p, find_shift
from rankship_pipeline.foundation.codec import to_plain
from rankship_pipeline.foundation.errors import UnlikeConditions
from rankship_pipeline.foundation.frozen import record
from speed.records import Figure, Machine, Results, find_row

SIGNIFICANCE = 0.01  # of any false verdict among all figures of a comparison (Holm)


@record
class Verdict:
    """How one figure changed: `ratio` is the later over the earlier, so above 1 is worse.

    It is worse or better if it moved by more than the figure's effect, and either the rank test is significant or,
    where the samples are too few for that test, the samples of the two commits do not overlap.
    """

    subject: str
    size: str
    figure: str
    verdict: Literal["better", "worse", "same", "unknown"]
    ratio: float
    reason: str


def refuse_unlike(before: Machine, after: Machine, where: str, but: Collection[str] = ()) -> None:
    """Raise UnlikeConditions, naming what differs `but` for some fields, if figures of two machines would be mixed."""
    first, second = (to_plain(one, without_defaults=False) for one in (before, after))
    keys = [key for key in first if key not in but and first[key] != second[key]]
    differing = [f"{key} {first[key]} there, {second[key]} here" for key in keys]
    if differing:
        raise UnlikeConditions(
            f"{where} is of another machine: " + "; ".join(differing),
            hint="measure the earlier commit here, or write to another file",
        )


def judge(
    before: Results, after: Results, where: str = "the baseline", but: Collection[str] = ()
) -> tuple[Verdict, ...]:
    """Judge every figure that both have and that is to be compared; the machines may differ in the fields `but`."""
    refuse_unlike(before.machine, after.machine, where, but)
    pairs = list(_pair(before, after))
    shifts = [find_shift(old.samples, new.samples) for _, _, old, new in pairs]
    adjusted = correct_holm([one.p_value for one in shifts])
    verdicts = []
    for (subject, size, old, new), shift, p_value in zip(pairs, shifts, adjusted, strict=True):
        ratio = shift.ratio.value
        is_testable = find_least_p(len(old.samples), len(new.samples)) * len(pairs) <= SIGNIFICANCE
        is_certain = p_value <= SIGNIFICANCE if is_testable else _are_apart(old, new)
        how = f"p = {p_value:.2g}" if is_testable else "by ranges, few samples"
        verdict = _pick_verdict(ratio, old.effect or 0, is_certain=is_certain)
        verdicts.append(Verdict(subject=subject, size=size, figure=old.name, verdict=verdict, ratio=ratio, reason=how))
    return tuple(verdicts)


def list_lost(before: Results, after: Results) -> list[str]:
    """Return, in words, the subjects that had figures before and have none now."""
    return [
        f"{row.subject}, {row.size}: {row.stopped}"
        for row in after.rows
        if row.stopped is not None and (old := find_row(before.rows, row.subject, row.size)) and old.stopped is None
    ]


def _pair(before: Results, after: Results) -> Iterator[tuple[str, str, Figure, Figure]]:
    for row in after.rows:
        old = find_row(before.rows, row.subject, row.size)
        if old is None or old.measured.parameters != row.measured.parameters:
            continue
        known = {one.name: one for one in old.measured.figures}
        for figure in row.measured.figures:
            earlier = known.get(figure.name)
            if earlier and earlier.effect is not None and min(*earlier.samples, *figure.samples, 1.0) > 0:
                yield row.subject, row.size, earlier, figure


def _pick_verdict(ratio: float, effect: float, *, is_certain: bool) -> Literal["better", "worse", "same", "unknown"]:
    if 1 / (1 + effect) <= ratio <= 1 + effect:
        return "same"
    if not is_certain:
        return "unknown"
    return "worse" if ratio > 1 else "better"


def _are_apart(old: Figure, new: Figure) -> bool:
    return min(new.samples) > max(old.samples) or max(new.samples) < min(old.samples)
