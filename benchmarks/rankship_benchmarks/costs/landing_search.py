"""The search for a latency budget's landing: what to ask the table for next, when to stop, and the verdict.

Where both phases of a language model have a budget, each has its table, its tries and its corrections; a model is as
slow as the phase that is nearest to its budget or farthest above. Nothing here touches a device; landing.py makes the
tries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.landing import LandingTry, LandingVerdict
from rankship_pipeline.foundation.units import show_ns

TOLERANCE = 0.05  # share of the budget, to either side
CORRECTIONS = 3
NUDGES = 3  # further steps of the tolerance, when a request gives ranks that were tried before
HALVINGS = 6  # of the weight's range, between either phase alone
CLOSE = 0.01  # share of a limit that a plan may exceed it by its prediction; measuring corrects it

Try = tuple[LandingTry, ...]  # of one model, each phase
# Allocates this many ns of each phase by its table, builds and measures; None for ranks that were tried before.
Attempt = Callable[[tuple[int, ...]], Try | None]


@dataclass(frozen=True)
class Range:
    """The times that a table can be asked for: from its fastest model to its dense one."""

    least_ns: int
    dense_ns: int

    def clip(self, asked_ns: float) -> int:
        """Return the nearest time within the range."""
        return round(min(max(asked_ns, self.least_ns), self.dense_ns))


@dataclass(frozen=True)
class Goal:
    """One budget, its table's range, and what is timed, in words where it is not the only one."""

    budget_ns: int
    table: Range
    timed: str = ""


def approach(goals: Sequence[Goal], dense: Try, attempt: Attempt) -> tuple[list[Try], LandingVerdict]:
    """Try until a model's measured times meet every goal, with at most CORRECTIONS corrections; returns tries, verdict.

    `dense` is the dense model as measured now: if it is fast enough, nothing is tried. The first try is scaled by the
    device's speed now over its speed when the table was measured. BudgetInfeasible if every try is too slow.
    """
    if find_load(dense, goals) <= 1 + TOLERANCE:
        return [dense], "dense fits"
    tries: list[Try] = []
    asked = [goal.budget_ns * goal.table.dense_ns / one.measured_ns for goal, one in zip(goals, dense, strict=True)]
    while len(tries) <= CORRECTIONS:
        too_slow = bool(tries) and find_load(tries[-1], goals) > 1
        one = _attempt_new(attempt, goals, asked, -TOLERANCE if too_slow else TOLERANCE)
        if one is None:
            break
        tries.append(one)
        if has_landed(one, goals):
            return tries, "landed"
        phases = zip(*tries, strict=True)
        asked = [correct(own, goal.budget_ns) for own, goal in zip(phases, goals, strict=True)]
    if all(find_load(one, goals) > 1 for one in tries):
        raise _refuse(goals, dense, tries)
    return tries, "nearest below"


def _attempt_new(attempt: Attempt, goals: Sequence[Goal], asked_ns: Sequence[float], step: float) -> Try | None:
    """Return the first try with new ranks, from `asked_ns` on in steps of `step`; None if NUDGES steps find none."""
    for count in range(1 + NUDGES):
        pairs = zip(goals, asked_ns, strict=True)
        one = attempt(tuple(goal.table.clip(asked * (1 + step) ** count) for goal, asked in pairs))
        if one is not None:
            return one
    return None


def find_load(one: Try, goals: Sequence[Goal]) -> float:
    """Return a try's measured time over the budget, of the phase where that is largest."""
    return max(_list_loads(one, goals))


def _list_loads(one: Try, goals: Sequence[Goal]) -> list[float]:
    return [phase.measured_ns / goal.budget_ns for phase, goal in zip(one, goals, strict=True)]


def has_landed(one: Try, goals: Sequence[Goal]) -> bool:
    """Return whether a try's measured time lies within the tolerance of the budget, and no other phase's above it."""
    return abs(find_load(one, goals) - 1) <= TOLERANCE


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


def choose_try(tries: Sequence[Try], goals: Sequence[Goal]) -> int:
    """Return the position of the try to ship: the nearest within the tolerance, else the slowest below the budget."""
    loads = [find_load(one, goals) for one in tries]
    landed = [place for place, one in enumerate(tries) if has_landed(one, goals)]
    if landed:
        return min(landed, key=lambda place: abs(loads[place] - 1))
    fitting = [place for place, load in enumerate(loads) if load <= 1]
    return max(fitting, key=lambda place: loads[place])


def find_weight(asked_ns: Sequence[int], predict: Callable[[float], Sequence[int]]) -> float:
    """Return the weight of the first phase in the mean of both by which a plan meets both limits, or comes nearest.

    `predict` allocates by a weight and returns both phases' predicted times. It is asked for either phase alone, then
    by bisection towards the phase that is exceeded more; as shares of their limits both weigh about the same.
    """
    first_ns, second_ns = asked_ns
    low, high, excess = 0.0, 1.0, dict[float, float]()
    for turn in range(2 + HALVINGS):
        share = float(turn) if turn in {0, 1} else (low + high) / 2
        weight = share * second_ns / (share * second_ns + (1 - share) * first_ns)
        first, second = (cost / limit for cost, limit in zip(predict(weight), asked_ns, strict=True))
        excess[weight] = max(first, second)
        if excess[weight] <= 1 + CLOSE:
            return weight
        if turn > 1:
            low, high = (share, high) if first > second else (low, share)
    return min(excess, key=lambda weight: excess[weight])


def _measured(one: LandingTry) -> int:
    return one.measured_ns


def _refuse(goals: Sequence[Goal], dense: Try, tries: Sequence[Try]) -> BudgetInfeasible:
    """Make the error, with the range that can be reached: measured if the fastest was tried, else predicted."""
    fastest = min(tries, key=lambda one: find_load(one, goals))
    loads = _list_loads(fastest, goals)
    place = loads.index(max(loads))
    goal, one = goals[place], fastest[place]
    least = min(one.measured_ns, round(goal.table.least_ns * one.measured_ns / one.predicted_ns))
    beside = "" if len(goals) == 1 else ", though not beside the other budget" if least <= goal.budget_ns else ""
    return BudgetInfeasible(
        f"the budget is {show_ns(goal.budget_ns)}{goal.timed}; {len(tries)} tries measured"
        f" {show_ns(one.measured_ns)} at best, and {show_ns(least)} to {show_ns(dense[place].measured_ns)} (dense) can"
        f" be reached with these ranks and forms{beside}",
        hint="raise the budget into that range; or offer more by a smaller ranks.step",
    )
