"""The search for a latency budget's landing: what to ask the table for next, when to stop, and the verdict.

Nothing here touches a device; landing.py makes the tries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.records import LandingTry, LandingVerdict
from rankship_pipeline.foundation.units import show_ns

TOLERANCE = 0.05  # share of the budget, to either side
CORRECTIONS = 3
NUDGES = 3  # further steps of the tolerance, when a request gives ranks that were tried before

# Allocates this many ns by the table, builds and measures; None if that gives ranks that were tried before.
Attempt = Callable[[int], LandingTry | None]


@dataclass(frozen=True)
class Range:
    """The times that a table can be asked for: from its fastest model to its dense one."""

    least_ns: int
    dense_ns: int

    def clip(self, asked_ns: float) -> int:
        """Return the nearest time within the range."""
        return round(min(max(asked_ns, self.least_ns), self.dense_ns))


def approach(
    budget_ns: int, dense: LandingTry, table: Range, attempt: Attempt
) -> tuple[list[LandingTry], LandingVerdict]:
    """Try until a model's measured time meets the budget, with at most CORRECTIONS corrections; returns tries, verdict.

    `dense` is the dense model as measured now: if it is fast enough, nothing is tried. The first try is scaled by the
    device's speed now over its speed when the table was measured. BudgetInfeasible if every try is too slow.
    """
    if dense.measured_ns <= budget_ns * (1 + TOLERANCE):
        return [dense], "dense fits"
    tries: list[LandingTry] = []
    asked = budget_ns * table.dense_ns / dense.measured_ns
    while len(tries) <= CORRECTIONS:
        too_slow = bool(tries) and tries[-1].measured_ns > budget_ns
        one = _attempt_new(attempt, table, asked, -TOLERANCE if too_slow else TOLERANCE)
        if one is None:
            break
        tries.append(one)
        if has_landed(one, budget_ns):
            return tries, "landed"
        asked = correct(tries, budget_ns)
    if all(one.measured_ns > budget_ns for one in tries):
        raise _refuse(budget_ns, dense, table, tries)
    return tries, "nearest below"


def _attempt_new(attempt: Attempt, table: Range, asked_ns: float, step: float) -> LandingTry | None:
    """Return the first try with new ranks, from `asked_ns` on in steps of `step`; None if NUDGES steps find none."""
    for count in range(1 + NUDGES):
        one = attempt(table.clip(asked_ns * (1 + step) ** count))
        if one is not None:
            return one
    return None


def has_landed(one: LandingTry, budget_ns: int) -> bool:
    """Return whether a try's measured time lies within the tolerance of the budget."""
    return abs(one.measured_ns / budget_ns - 1) <= TOLERANCE


def correct(tries: Sequence[LandingTry], budget_ns: int) -> float:
    """Return what to ask the table for next: between the nearest tries on both sides of the budget, else in proportion.

    With tries on both sides, it interpolates linearly (regula falsi); with tries on one side, it scales the last one's
    predicted time by the budget over its measured time.
    """
    below = [one for one in tries if one.measured_ns <= budget_ns]
    above = [one for one in tries if one.measured_ns > budget_ns]
    if below and above:
        low, high = max(below, key=_measured), min(above, key=_measured)
        share = (budget_ns - low.measured_ns) / (high.measured_ns - low.measured_ns)
        return low.predicted_ns + share * (high.predicted_ns - low.predicted_ns)
    return tries[-1].predicted_ns * budget_ns / tries[-1].measured_ns


def choose_try(tries: Sequence[LandingTry], budget_ns: int) -> int:
    """Return the position of the try to ship: the nearest within the tolerance, else the slowest below the budget."""
    landed = [place for place, one in enumerate(tries) if has_landed(one, budget_ns)]
    if landed:
        return min(landed, key=lambda place: abs(tries[place].measured_ns - budget_ns))
    fitting = [place for place, one in enumerate(tries) if one.measured_ns <= budget_ns]
    return max(fitting, key=lambda place: tries[place].measured_ns)


def _measured(one: LandingTry) -> int:
    return one.measured_ns


def _refuse(budget_ns: int, dense: LandingTry, table: Range, tries: Sequence[LandingTry]) -> BudgetInfeasible:
    """Make the error, with the range that can be reached: measured if the fastest was tried, else predicted."""
    fastest = min(tries, key=_measured)
    scale = fastest.measured_ns / fastest.predicted_ns
    least = min(fastest.measured_ns, round(table.least_ns * scale))
    return BudgetInfeasible(
        f"the budget is {show_ns(budget_ns)}; {len(tries)} tries measured {show_ns(fastest.measured_ns)} at best, and"
        f" {show_ns(least)} to {show_ns(dense.measured_ns)} (dense) can be reached with these ranks and forms",
        hint="raise the budget into that range; or offer more by a smaller ranks.step",
    )
