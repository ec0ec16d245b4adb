"""Landing: devices that are slower than their table says, unevenly, noisily, or in steps; and how it ends each time."""

from collections.abc import Callable
from random import Random

import pytest

from rankship_benchmarks.landing import CORRECTIONS, TOLERANCE, Range, approach, choose_try, correct
from rankship_pipeline.errors import BudgetInfeasible
from rankship_pipeline.records import Landing, LandingTry
from rankship_pipeline.summary import state_landing

TABLE = Range(least_ns=300_000, dense_ns=1_000_000)


def make_try(predicted_ns: int, measured_ns: float, dense_ns: int = 1_000_000) -> LandingTry:
    return LandingTry(
        asked_ns=predicted_ns,
        predicted_ns=predicted_ns,
        measured_ns=round(measured_ns),
        low_ns=round(measured_ns) - 1000,
        high_ns=round(measured_ns) + 1000,
        dense_ns=dense_ns,
        ratio=measured_ns / dense_ns,
        ratio_low=None,
        ratio_high=None,
    )


class World:
    """A device where a plan that the table prices at p takes `true(p)`; plans exist at multiples of `step`."""

    def __init__(self, true: Callable[[float], float], step: int = 1000) -> None:
        self.true, self.step = true, step
        self.asked: list[int] = []
        self._seen: set[int] = set()

    def attempt(self, asked_ns: int) -> LandingTry | None:
        assert TABLE.least_ns <= asked_ns <= TABLE.dense_ns
        self.asked.append(asked_ns)
        plan = asked_ns // self.step * self.step
        if plan in self._seen:
            return None
        self._seen.add(plan)
        return make_try(plan, self.true(plan))

    def land(self, budget_ns: int) -> tuple[list[LandingTry], str]:
        return approach(budget_ns, make_try(TABLE.dense_ns, self.true(TABLE.dense_ns)), TABLE, self.attempt)


@pytest.mark.parametrize("budget_ns", [350_000, 500_000, 800_000, 930_000])
@pytest.mark.parametrize(
    "true",
    [
        lambda p: p,
        lambda p: 2 * p,  # the device is slower now than it was
        lambda p: p + 120_000,  # something the table does not know
        lambda p: 0.7 * p + 0.3 * p * p / 1e6,  # unevenly
        lambda p: 1.25 * p if p < 6e5 else 0.9 * p,  # a kink
    ],
)
def test_every_device_that_can_is_landed_on(budget_ns: int, true: Callable[[float], float]) -> None:
    world = World(true)
    reachable = true(TABLE.least_ns) <= budget_ns * (1 + TOLERANCE)
    if not reachable:
        with pytest.raises(BudgetInfeasible, match="can be reached"):
            world.land(budget_ns)
        return
    tries, word = world.land(budget_ns)
    shipped = tries[choose_try(tries, budget_ns)]
    assert word in {"landed", "dense fits"}
    assert len(tries) <= 1 + CORRECTIONS
    if word == "landed":
        assert abs(shipped.measured_ns / budget_ns - 1) <= TOLERANCE
    else:
        assert shipped.measured_ns <= budget_ns * (1 + TOLERANCE)


def test_a_device_that_only_became_slower_takes_one_try() -> None:
    world = World(lambda p: 3 * p)
    tries, word = world.land(1_800_000)
    assert (word, len(tries)) == ("landed", 1)
    assert world.asked == [600_000]


def test_noise_of_three_per_cent_lands_almost_always() -> None:
    random = Random(1)  # noqa: S311 - not for secrets
    words = []
    for _ in range(200):
        world = World(lambda p: (p + 100_000) * random.gauss(1, 0.03))
        words.append(world.land(600_000)[1])
    assert words.count("landed") >= 190


def test_a_coarse_staircase_ships_the_nearest_below_and_says_so() -> None:
    tries, word = World(lambda p: p, step=200_000).land(700_000)
    assert word == "nearest below"
    assert tries[choose_try(tries, 700_000)].measured_ns == 600_000


def test_a_budget_out_of_reach_names_the_range_that_is_not() -> None:
    with pytest.raises(BudgetInfeasible, match=r"budget is 400\.0 µs; .* 600\.0 µs to 2,000\.0 µs \(dense\)"):
        World(lambda p: 2 * p).land(400_000)


def test_a_fast_enough_dense_model_is_left_alone() -> None:
    tries, word = World(lambda p: p).land(1_000_000)
    assert (word, len(tries)) == ("dense fits", 1)


def test_a_correction_lies_between_tries_on_both_sides() -> None:
    tries = [make_try(400_000, 500_000), make_try(300_000, 350_000), make_try(600_000, 900_000)]
    assert correct(tries, 700_000) == pytest.approx(500_000)
    assert correct(tries[:2], 700_000) == pytest.approx(300_000 * 7 / 3.5)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("landed", "landed; the table foretold 400.0 µs, measured 410.0 µs [409.0 µs, 411.0 µs], error +2.5 % after 2"),
        ("dense fits", "the dense model takes 410.0 µs, so nothing was compressed"),
    ],
)
def test_a_landing_is_told_in_a_sentence(word: str, said: str) -> None:
    landing = Landing(
        budget_ns=400_000,
        device="pi4",
        format="onnx",
        runtime="onnxruntime 1",
        threads=1,
        table_sha256="t",
        rounds=9,
        tries=(make_try(300_000, 500_000), make_try(400_000, 410_000)),
        chosen=1,
        word=word,  # type: ignore[arg-type]
    )
    assert landing.error == pytest.approx(0.025)
    assert said in state_landing(landing)
    assert "400.0 µs in onnx on pi4" in state_landing(landing)
