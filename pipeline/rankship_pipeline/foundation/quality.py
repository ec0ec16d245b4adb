"""How good a model is: a score with its measure, and the fidelity of one model to another."""

from dataclasses import field
from typing import Literal

from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.units import show_percent

QualityKind = Literal[
    "classification",
    "token-classification",
    "question-answering",
    "regression",
    "dense-map",
    "embedding",
    "language-model",
    "fidelity",
]
_DIGITS = 4


@record
class Measure:
    """What a score counts, and how it is shown and compared.

    `unit` is "%" for a share (kept as 0 … 1, shown as 0 … 100), "" for a plain number. With `points` a hundredth is a
    point lost, as of shares, R² and cosines; a loss of any other measure is relative to the score before.
    """

    name: str = "accuracy"
    unit: Literal["%", ""] = "%"
    higher_is_better: bool = True
    points: bool = True

    @property
    def heading(self) -> str:
        """Its name with its direction, where lower is better."""
        return self.name if self.higher_is_better else f"{self.name} (lower is better)"

    def show(self, value: float) -> str:
        """A value in its unit: "91.7 %", "0.9871"."""
        return show_percent(value) if self.unit else f"{value:.{_DIGITS}g}"

    def scale(self, value: float) -> float:
        """A value as charts and tables of numbers hold it: a share in per cent."""
        return 100 * value if self.unit else value

    def find_loss(self, before: float, after: float) -> float:
        """Points lost from one score to another, negative if it got better."""
        lost = 100 * (before - after if self.higher_is_better else after - before)
        return lost if self.points or before == 0 else lost / abs(before)


ACCURACY = Measure()


@record
class Score:
    """A model's quality on test inputs after `stage`, by one `measure`.

    `samples` are the answers that counted: test inputs, or positions that have a target. `low` and `high` are the 95 %
    interval, None where there is none. `correct` is how many answers were right, None for measures that count none.
    `cross_entropy` is the mean of −ln p(correct answer) in nats, None where answers have no probabilities. `also` has
    further figures by name.
    """

    stage: str
    samples: int
    value: float
    low: float | None = None
    high: float | None = None
    measure: Measure = ACCURACY
    correct: int | None = None
    cross_entropy: float | None = None
    also: dict[str, float] = field(default_factory=dict)

    def show(self) -> str:
        """The value in its measure's unit."""
        return self.measure.show(self.value)

    def show_interval(self) -> str:
        """The interval in brackets, in the measure's unit; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"[{self.measure.show(self.low)}, {self.measure.show(self.high)}]"


@record
class Fidelity:
    """How well the model of a later `stage` does one specialist's own task.

    `agreement` is the share of the specialist's calibration `answers` on which both models have the same class, None
    where the outputs are no classes' scores; `relative_error` is the error of the outputs as a share of their own
    spread, the worst output's. Both need no labels, but the merge was fitted on these inputs. `before` and `after` are
    the scores of the specialist and of the stage on that task's own test data, None where the loader gives none.
    """

    stage: str
    source: str
    answers: int
    agreement: float | None
    before: Score | None = None
    after: Score | None = None
    relative_error: float | None = None

    @property
    def lost_points(self) -> float:
        """Points of the test score lost (negative: gained); else of agreement; else of the outputs' spread."""
        if self.before is not None and self.after is not None:
            return self.before.measure.find_loss(self.before.value, self.after.value)
        if self.agreement is not None:
            return 100 * (1 - self.agreement)
        return 100 * (self.relative_error or 0.0)
