"""Time is a staircase in rank (METHODS §9): where its steps end, found with few measurements, and what to offer of it.

A ladder is one form's ranks at one site, rising; what is measured of it is told by position, each as a ratio to the
dense layer with its interval over sweeps. Two ranks differ where their intervals do not touch.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from rankship_benchmarks.stats.estimates import Estimate

JUMP = 0.05  # of the dense layer's time: smaller differences between neighbours are not looked into


def spread_positions(length: int, count: int) -> list[int]:
    """At most `count` positions of a ladder, its first and last among them, as evenly as whole numbers allow."""
    if length <= count:
        return list(range(length))
    return sorted({round(place * (length - 1) / (count - 1)) for place in range(count)})


def find_gaps(measured: Mapping[int, Estimate]) -> list[int]:
    """The positions to measure next: the middle between neighbours whose times differ, where the lower may be offered.

    Bisecting on halves each gap until a step's last rank and the next step's first are neighbours.
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
    """The positions to offer: of those shown to be cheaper than dense, the last of each step.

    A step goes on while no rank is shown to be slower than its first; the ranks inside are free accuracy.
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
    """Whether a layer's ratio to dense is shown to lie below one, and is a time at all."""
    return ratio.high is not None and ratio.high < 1 and ratio.value > 0


def is_slower(one: Estimate, other: Estimate) -> bool:
    """Whether one is shown to take longer than the other: their intervals do not touch."""
    return one.low is not None and other.high is not None and one.low > other.high


def pick_rungs(length: int, passes: Sequence[Mapping[int, Estimate]], count: int) -> list[int]:
    """The positions of a ladder to measure in the next pass: an even grid first, then what bisection asks for."""
    if not passes:
        return spread_positions(length, count)
    measured = {place: ratio for one in passes for place, ratio in one.items()}
    return find_gaps(measured)
