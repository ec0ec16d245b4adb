"""Landing a prompt's and a token's time together: the weight of both, corrections of each, and the errors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from random import Random

import pytest

from rankship_benchmarks.costs.landing_search import (
    CLOSE,
    TOLERANCE,
    Goal,
    Range,
    Try,
    approach,
    choose_try,
    find_load,
    find_weight,
)
from rankship_pipeline.flow.show import state_landing
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.landing import Landing, LandingTry
from rankship_pipeline.ranks.joint_price import mean_limit

Way = tuple[int, int, float]  # ns of a prompt, ns of a token, loss


def make_menus(count: int, seed: int = 0) -> list[list[Way]]:
    """Layers with a way that saves operations, one that saves bytes, and some between; a prompt takes 30 tokens."""
    random = Random(seed)  # noqa: S311 - not for secrets
    menus = []
    for _ in range(count):
        size, loss = random.randint(500, 2000), random.uniform(0.5, 2)
        shares = [(1.0, 1.0, 0.0), (0.5, 0.9, 1.0), (0.9, 0.3, 1.0), (0.7, 0.6, 0.9), (0.4, 0.3, 2.5)]
        menus.append([(round(30 * size * one), round(size * two), loss * lost) for one, two, lost in shares])
    return menus


@dataclass
class Device:
    """One on which a phase takes as much longer than its table says as its `pace`, after a `start` of so many ns."""

    menus: list[list[Way]]
    paces: tuple[float, float] = (1.0, 1.0)
    starts: tuple[int, int] = (0, 0)
    weights: list[float] = field(default_factory=list)
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def total(self, picked: Sequence[Way]) -> tuple[int, int]:
        return sum(way[0] for way in picked), sum(way[1] for way in picked)

    @property
    def dense(self) -> tuple[int, int]:
        return self.total([menu[0] for menu in self.menus])

    @property
    def least(self) -> tuple[int, int]:
        return tuple(sum(min(way[at] for way in menu) for menu in self.menus) for at in (0, 1))  # type: ignore[return-value]

    def pick(self, asked: Sequence[int], weight: float) -> list[Way]:
        """The least loss within the mean's limit, to the last ways on the hull: a Lagrangian is exact enough here."""
        limit = mean_limit(asked[0], asked[1], weight)

        def mean(picked: Sequence[Way]) -> float:
            first, second = self.total(picked)
            return weight * first + (1 - weight) * second

        def choose(price: float) -> list[Way]:
            first, second = price * weight, price * (1 - weight)
            return [min(menu, key=lambda way: way[2] + first * way[0] + second * way[1]) for menu in self.menus]

        low, high = 0.0, 1.0  # of loss for a ns
        for _ in range(25):
            middle = (low + high) / 2
            low, high = (low, middle) if mean(choose(middle)) <= limit else (middle, high)
        return choose(high)

    def measure(self, costs: tuple[int, int], asked: Sequence[int]) -> Try:
        return tuple(
            LandingTry(
                asked_ns=want,
                predicted_ns=cost,
                measured_ns=round(start + pace * cost),
                low_ns=None,
                high_ns=None,
                dense_ns=round(start + pace * dense),
                ratio=1.0,
                ratio_low=None,
                ratio_high=None,
            )
            for want, cost, dense, pace, start in zip(asked, costs, self.dense, self.paces, self.starts, strict=True)
        )

    def attempt(self, asked: tuple[int, ...]) -> Try | None:
        self.weights.append(find_weight(asked, lambda one: self.total(self.pick(asked, one))))
        costs = self.total(self.pick(asked, self.weights[-1]))
        if costs in self._seen:
            return None
        self._seen.add(costs)
        return self.measure(costs, asked)

    def set_goals(self, first: float, second: float) -> list[Goal]:
        """Budgets as shares of what dense takes on the device."""
        dense = self.measure(self.dense, self.dense)
        named = (" for the first token", " for a token")
        return [
            Goal(round(share * one.measured_ns), Range(least, cost), name)
            for share, one, least, cost, name in zip((first, second), dense, self.least, self.dense, named, strict=True)
        ]

    def land(self, goals: list[Goal]) -> tuple[list[Try], str]:
        return approach(goals, self.measure(self.dense, self.dense), self.attempt)


def test_a_phase_that_is_met_anyway_has_no_weight() -> None:
    device = Device(make_menus(40))
    for shares, weight in {(0.99, 0.6): 0.0, (0.6, 0.99): 1.0}.items():
        asked = tuple(round(share * dense) for share, dense in zip(shares, device.dense, strict=True))
        asked_of: list[float] = []

        def predict(one: float, asked: tuple[int, ...] = asked, asked_of: list[float] = asked_of) -> tuple[int, int]:
            asked_of.append(one)
            return device.total(device.pick(asked, one))

        assert find_weight(asked, predict) == weight
        assert asked_of == [0.0, 1.0][: 1 + int(weight)], "one phase alone is tried before a mean of both"


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_within_both_limits_loses_as_little_as_the_best_of_all(seed: int) -> None:
    device = Device(make_menus(6, seed))
    asked = round(0.72 * device.dense[0]), round(0.72 * device.dense[1])
    weight = find_weight(asked, lambda one: device.total(device.pick(asked, one)))
    picked = device.pick(asked, weight)
    costs = device.total(picked)
    best = min(
        sum(way[2] for way in ways)
        for ways in product(*device.menus)
        if all(cost <= max(own, limit) for cost, own, limit in zip(device.total(ways), costs, asked, strict=True))
    )
    alone = [sum(way[2] for way in device.pick(asked, one)) for one in (0.0, 1.0)]
    assert 0 < weight < 1
    assert max(alone) <= sum(way[2] for way in picked) <= best + max(way[2] for menu in device.menus for way in menu)


@pytest.mark.parametrize("shares", [(0.7, 0.7), (0.55, 0.8), (0.8, 0.5)])
@pytest.mark.parametrize(
    ("paces", "starts"), [((1.0, 1.0), (0, 0)), ((1.6, 0.8), (100_000, 0)), ((0.7, 2.0), (0, 5_000))]
)
def test_both_phases_of_any_device_are_landed(
    shares: tuple[float, float], paces: tuple[float, float], starts: tuple[int, int]
) -> None:
    device = Device(make_menus(40), paces, starts)
    goals = device.set_goals(*shares)
    tries, verdict = device.land(goals)
    shipped = tries[choose_try(tries, goals)]
    assert verdict == "landed"
    assert all(one.measured_ns <= (1 + TOLERANCE) * goal.budget_ns for one, goal in zip(shipped, goals, strict=True))
    assert find_load(shipped, goals) >= 1 - TOLERANCE


def test_each_phase_is_corrected_by_its_own_error() -> None:
    device = Device(make_menus(80), starts=(0, 12_000))  # which no layer's rank changes
    goals = device.set_goals(0.7, 0.75)
    tries, _ = device.land(goals)
    assert len(tries) == 2
    (first, second), (again, further) = tries
    assert second.measured_ns > goals[1].budget_ns > further.measured_ns / (1 + TOLERANCE)
    assert further.asked_ns < second.asked_ns
    assert again.asked_ns == pytest.approx(first.asked_ns, rel=2 * CLOSE)


def test_a_dense_model_that_meets_both_is_left_alone() -> None:
    device = Device(make_menus(5))
    assert device.land(device.set_goals(1.0, 1.2))[1] == "dense fits"
    assert device.land(device.set_goals(1.0, 0.9))[1] != "dense fits"


def test_a_budget_out_of_reach_names_its_phase_and_range() -> None:
    device = Device(make_menus(40))
    with pytest.raises(BudgetInfeasible, match=r"for a token; .* at best, and .* \(dense\) can be .* and forms\n"):
        device.land(device.set_goals(0.9, 0.2))
    with pytest.raises(BudgetInfeasible, match="for the first token; "):
        device.land(device.set_goals(0.2, 0.9))
    either = Device([menu[:3] for menu in make_menus(40)])
    with pytest.raises(BudgetInfeasible, match="though not beside the other budget"):
        either.land(either.set_goals(0.6, 0.4))


def test_a_landing_of_both_is_told_with_both_and_read_back() -> None:
    token = Landing(
        budget_ns=60_000_000,
        device="pi4",
        format="onnx",
        runtime="onnxruntime 1",
        threads=1,
        table_sha256="t",
        rounds=9,
        tries=(
            LandingTry(
                asked_ns=60_000_000,
                predicted_ns=59_000_000,
                measured_ns=61_200_000,
                low_ns=61_000_000,
                high_ns=62_000_000,
                dense_ns=90_000_000,
                ratio=0.68,
                ratio_low=None,
                ratio_high=None,
                weight=0.0625,
            ),
        ),
        chosen=0,
        verdict="landed",
        part="decode",
        prompt_tokens=128,
    )
    tries = (replace(token.tries[0], measured_ns=800_000_000, low_ns=None, dense_ns=950_000_000, ratio=0.84),)
    both = replace(token, budget_ns=900_000_000, part="prefill 128", tries=tries, beside=token)
    assert decode(Landing, encode(both), where="here") == both
    said = state_landing(both)
    assert said.startswith(
        "Latency budgets 900.00 ms for the first token after a prompt of 128 and 60.00 ms for a token after a prompt of"
        " 128 in onnx on pi4: landed after 1 try; the first token after a prompt of 128 predicted"
    )
    assert "measured 800.00 ms, error -11.1 %; the dense model takes 950.00 ms, ratio 0.84; a token" in said
    assert "measured 61.20 ms [61.00 ms, 62.00 ms], error +2.0 %" in said
    fits = state_landing(replace(both, verdict="dense fits"))
    assert fits.endswith("the dense model takes 800.00 ms and 61.20 ms, so nothing was compressed")
