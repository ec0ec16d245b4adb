"""From tries to a latency budget that is met: what to ask the table for next, when to stop, and how it ended.

Nothing here touches a device; land.py makes the tries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.records import LandingTry, LandingVerdict
from rankship_pipeline.foundation.units import show_ns

TOLERANCE = 0.05  # of the budget, to either side
CORRECTIONS = 3
NUDGES = 3  # steps of the tolerance past an answer that gives ranks tried before

# Allocates so much of the table, builds, measures; None where that gives ranks that were tried before.
Attempt = Callable[[int], LandingTry | None]


@dataclass(frozen=True)
class Range:
    """What a table can be asked for: its fastest model, and its dense one."""

    least_ns: int
    dense_ns: int

    def clip(self, asked_ns: float) -> int:
        """The nearest that can be asked for."""
        return round(min(max(asked_ns, self.least_ns), self.dense_ns))


def approach(
    budget_ns: int, dense: LandingTry, table: Range, attempt: Attempt
) -> tuple[list[LandingTry], LandingVerdict]:
    """Try until a model's measured time is the budget, at most once and CORRECTIONS times; gives the tries and the end.

    `dense` is the dense model as measured now: where it is fast enough, nothing is tried. The first try is scaled by
    how fast the device is now and was when the table was taken. BudgetInfeasible where every try is too slow.
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
    """The first try of new ranks from here on, in steps of this share; None where there are none near."""
    for count in range(1 + NUDGES):
        one = attempt(table.clip(asked_ns * (1 + step) ** count))
        if one is not None:
            return one
    return None


def has_landed(one: LandingTry, budget_ns: int) -> bool:
    """Whether a try's measured time lies within the tolerance."""
    return abs(one.measured_ns / budget_ns - 1) <= TOLERANCE


def correct(tries: Sequence[LandingTry], budget_ns: int) -> float:
    """What to ask the table for next: between the nearest tries on both sides of the budget, else in proportion.

    With tries on both sides, linearly between them (regula falsi); with tries on one side, the last one's foretold
    time scaled by how far its measured one is off.
    """
    below = [one for one in tries if one.measured_ns <= budget_ns]
    above = [one for one in tries if one.measured_ns > budget_ns]
    if below and above:
        low, high = max(below, key=_measured), min(above, key=_measured)
        share = (budget_ns - low.measured_ns) / (high.measured_ns - low.measured_ns)
        return low.predicted_ns + share * (high.predicted_ns - low.predicted_ns)
    return tries[-1].predicted_ns * budget_ns / tries[-1].measured_ns


def choose_try(tries: Sequence[LandingTry], budget_ns: int) -> int:
    """The try to ship: the nearest within the tolerance, else the slowest that is below the budget."""
    landed = [place for place, one in enumerate(tries) if has_landed(one, budget_ns)]
    if landed:
        return min(landed, key=lambda place: abs(tries[place].measured_ns - budget_ns))
    fitting = [place for place, one in enumerate(tries) if one.measured_ns <= budget_ns]
    return max(fitting, key=lambda place: tries[place].measured_ns)


def _measured(one: LandingTry) -> int:
    return one.measured_ns


def _refuse(budget_ns: int, dense: LandingTry, table: Range, tries: Sequence[LandingTry]) -> BudgetInfeasible:
    """Say what can be reached: as measured where the fastest was tried, else as the table foretells it."""
    fastest = min(tries, key=_measured)
    scale = fastest.measured_ns / fastest.predicted_ns
    least = min(fastest.measured_ns, round(table.least_ns * scale))
    return BudgetInfeasible(
        f"the budget is {show_ns(budget_ns)}; {len(tries)} tries measured {show_ns(fastest.measured_ns)} at best, and"
        f" {show_ns(least)} to {show_ns(dense.measured_ns)} (dense) can be reached with these ranks and forms",
        hint="raise budget.latency_ms into that range; or offer more by a smaller ranks.step",
    )
