"""The record of how a budget of time was met on its device: every try, and which one is shipped."""

from typing import Literal

from rankship_pipeline.foundation.artifact_key import WHOLE
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record

LandingVerdict = Literal["landed", "dense fits", "nearest below"]


@record
class LandingTry:
    """One allocation on the way to a latency budget: the time asked for, the time predicted, the time measured.

    `measured_ns` is the whole compressed model's median over rounds on the device, `low_ns` and `high_ns` its 95 %
    interval. `dense_ns` is the dense model's median in the same rounds. `ratio` is compressed over dense, paired by
    rounds, with its interval. `weight` is that of a prompt's costs in the mean of both phases by which it was
    allocated; None where one time is budgeted.
    """

    asked_ns: int
    predicted_ns: int
    measured_ns: int
    low_ns: int | None
    high_ns: int | None
    dense_ns: int
    ratio: float
    ratio_low: float | None
    ratio_high: float | None
    weight: float | None = None


@record
class Landing:
    """How a latency budget was met on its device: every try in order, and the index of the `chosen` one.

    `verdict` is "landed" when the chosen try is within the tolerance; "dense fits" when the dense model is fast enough
    and nothing was compressed; "nearest below" when no try was within it and the chosen one is the nearest faster one.
    `part` and `prompt_tokens` are those of the table. Where a prompt and a token each have a budget, this is the
    prompt's and `beside` the token's: of the same tries, with one verdict, that of the phase nearer to its budget.
    """

    budget_ns: int
    device: str
    format: Format
    runtime: str
    threads: int
    table_sha256: str
    rounds: int
    tries: tuple[LandingTry, ...]
    chosen: int
    verdict: LandingVerdict
    part: str = WHOLE
    prompt_tokens: int | None = None
    beside: "Landing | None" = None

    @property
    def phases(self) -> "tuple[Landing, ...]":
        """The landing of each phase that has a budget: itself, and the one beside it."""
        return (self,) if self.beside is None else (self, self.beside)

    @property
    def shipped(self) -> LandingTry:
        """The try whose ranks are used."""
        return self.tries[self.chosen]

    @property
    def error(self) -> float:
        """Distance of the shipped model's measured time from the budget, as a share of the budget; above 0: slower."""
        return self.shipped.measured_ns / self.budget_ns - 1
