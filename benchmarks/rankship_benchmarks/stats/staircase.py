"""Time is a staircase in rank: finds where its steps end with few measurements, and the ranks to offer.

A ladder is one form's ranks at one site, rising. Measurements are given by position in it, each as a ratio to the
dense layer with its interval over sweeps. Two ranks differ if their intervals do not overlap.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from rankship_benchmarks.stats.estimates import Estimate

JUMP = 0.05  # share of the dense layer's time: smaller differences between neighbours are not bisected


def spread_positions(length: int, count: int) -> list[int]:
    """Return at most `count` positions of a ladder, evenly spread, with its first and last."""
    if length <= count:
        return list(range(length))
    return sorted({round(place * (length - 1) / (count - 1)) for place in range(count)})


def find_gaps(measured: Mapping[int, Estimate]) -> list[int]:
    """Return the positions to measure next: midpoints of neighbours whose times differ, if the lower may be offered.

    Repeated bisection halves each gap until a step's last rank and the next step's first are neighbours.
    """
    return [
        (left + right) // 2
        for left, right in pairwise(sorted(measured))
        if right - left > 1
        and is_cheaper(measured[left])
        and is_slower(measured[right], measured[left])
        and measured[right].value - measured[left].value > JUMP
    ]


def keep_steps(measured: Mapping[int, Estimate]) -> list[int]:
    """Return the positions to offer: of those shown to be cheaper than dense, the last of each step.

    A step lasts while no rank is shown to be slower than its first, so its last rank is the most accurate at its cost.
    """
    cheaper = [place for place in sorted(measured) if is_cheaper(measured[place])]
    kept: list[int] = []
    first: int | None = None
    for place in cheaper:
        if first is None or is_slower(measured[place], measured[first]):
            first = place
            kept.append(place)
        else:
            kept[-1] = place
    return kept


def is_cheaper(ratio: Estimate) -> bool:
    """Return whether a layer's ratio to dense is shown to lie below 1, and is above 0."""
    return ratio.high is not None and ratio.high < 1 and ratio.value > 0


def is_slower(one: Estimate, other: Estimate) -> bool:
    """Return whether `one` is shown to take longer than `other`: their intervals do not overlap."""
    return one.low is not None and other.high is not None and one.low > other.high


def pick_rungs(length: int, passes: Sequence[Mapping[int, Estimate]], count: int) -> list[int]:
    """Return the positions of a ladder to measure in the next pass: first an even grid, then bisection."""
    if not passes:
        return spread_positions(length, count)
    measured = {place: ratio for one in passes for place, ratio in one.items()}
    return find_gaps(measured)
