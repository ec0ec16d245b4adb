"""Landing: devices that are slower than their table says, unevenly, noisily, or in steps; and how it ends each time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from make.devices import make_local
from make.recipes import write_priced_recipe
from rankship_benchmarks.costs import landing as land
from rankship_benchmarks.costs import landing_search as landing
from rankship_benchmarks.costs.landing_search import (
    CORRECTIONS,
    TOLERANCE,
    Goal,
    Range,
    Try,
    approach,
    choose_try,
    correct,
)
from rankship_benchmarks.costs.runtime_on_device import Place, Subject, choose_place
from rankship_pipeline.flow.build import build_recipe, find_build
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.show import print_build, state_landing
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.codec import digest, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BudgetInfeasible, InputError
from rankship_pipeline.foundation.landing import Landing, LandingTry, LandingVerdict
from rankship_pipeline.foundation.records import Artifact, CostTable, Factors, LayerCost, Stored
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.rules import read_recipe
from rankship_targets.session.session import open_session

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

    def attempt(self, all_asked: tuple[int, ...]) -> Try | None:
        (asked_ns,) = all_asked
        assert TABLE.least_ns <= asked_ns <= TABLE.dense_ns
        self.asked.append(asked_ns)
        plan = asked_ns // self.step * self.step
        if plan in self._seen:
            return None
        self._seen.add(plan)
        return (make_try(plan, self.true(plan)),)

    def land(self, budget_ns: int) -> tuple[list[Try], str]:
        dense = make_try(TABLE.dense_ns, self.true(TABLE.dense_ns))
        return approach([Goal(budget_ns, TABLE)], (dense,), self.attempt)


def find_shipped(tries: list[Try], budget_ns: int) -> LandingTry:
    return tries[choose_try(tries, [Goal(budget_ns, TABLE)])][0]


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
    shipped = find_shipped(tries, budget_ns)
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
    assert find_shipped(tries, 700_000).measured_ns == 600_000


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
    ("verdict", "said"),
    [
        ("landed", "landed; predicted 400.0 µs, measured 410.0 µs [409.0 µs, 411.0 µs], error +2.5 % after 2"),
        ("dense fits", "the dense model takes 410.0 µs, so nothing was compressed"),
    ],
)
def test_a_landing_is_told_in_a_sentence(verdict: LandingVerdict, said: str) -> None:
    landed = Landing(
        budget_ns=400_000,
        device="pi4",
        format="onnx",
        runtime="onnxruntime 1",
        threads=1,
        table_sha256="t",
        rounds=9,
        tries=(make_try(300_000, 500_000), make_try(400_000, 410_000)),
        chosen=1,
        verdict=verdict,
    )
    assert landed.error == pytest.approx(0.025)
    assert said in state_landing(landed)
    assert "400.0 µs in onnx on pi4" in state_landing(landed)


NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

def load():
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    return {"calibration": {"a": x[:16]}, "test_inputs": x[16:], "test_labels": torch.arange(8) % 3}
"""
BUDGET = 'latency_ms = 0.001\non = "here"\ncosts = "cost-table.json"\n'


def make_table(prepared: Prepared, place: Place, weights: Precision = "float32") -> CostTable:
    """A table in which the middle layer is nearly all of the model's time, and cheap at rank 4 in one type."""
    factored = LayerCost(factors=Factors(rank=4), cost=9_000, weights=weights)
    dense = [LayerCost(factors=None, cost=90_000, weights=one) for one in dict.fromkeys(("float32", weights))]
    cheap = (*dense, factored)
    layers = {"0": cheap[:1], "2": cheap, "4": cheap[:1]}
    return CostTable(
        unit="ns",
        device="here",
        format="onnx",
        runtime=place.runtime,
        threads=1,
        agent_sha256=place.session.agent_sha256,
        measured_utc="2026-11-25T00:00:00Z",
        rounds=9,
        model_sha256=prepared.hash_model(),
        dense=280_000,
        fixed=10_000,
        layers=layers,
        activations=None if weights == "float32" else "dynamic",
    )


@pytest.mark.slow
def test_ranks_and_types_are_landed_together_and_the_rounded_file_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = '[precision]\nweights = ["float32", "int8"]\nactivations = "dynamic"\n'
    write_priced_recipe(tmp_path, NET, BUDGET + bits)
    store, steps, pushed = Store(tmp_path / "store"), Steps(quiet=True), []
    plain = replace(read_recipe(tmp_path / "net.toml"), budget=Budget(kept_parameters=1.0))
    monkeypatch.setattr(land, "ROUNDS", 2)
    monkeypatch.setattr(landing, "has_landed", lambda *_: True)
    real = Place.push

    def push(place: Place, site: str, name: str, artifact: Artifact, *rest: Any) -> Subject:  # noqa: ANN401 - as given
        pushed.append(artifact.sha256)
        return real(place, site, name, artifact, *rest)

    monkeypatch.setattr(Place, "push", push)
    here = make_local(tmp_path / "work")
    with open_session(here) as session:
        table = make_table(prepare(plain, tmp_path), choose_place(session, "onnx", 1), "int8")
    (tmp_path / "cost-table.json").write_text(encode(replace(table, activations="static")))
    with pytest.raises(InputError, match="static activations, the recipe computes dynamic ones"):
        prepare(read_recipe(tmp_path / "net.toml"), tmp_path)
    (tmp_path / "cost-table.json").write_text(encode(table))
    prepared = prepare(read_recipe(tmp_path / "net.toml"), tmp_path)
    land.land_missing(prepared, store, here, tmp_path, steps)
    build, _ = build_recipe(prepared, store, steps)
    assert build.plan.layers[1].stored == Stored(factors=Factors(rank=4), weights="int8")
    assert [one.key.title for one in build.artifacts] == ["dense onnx", "compressed onnx, int8"]
    assert build.artifacts[1].sha256 in pushed, "the file that was timed is the one that ships"


@pytest.mark.slow
def test_a_recipe_is_landed_once_and_then_built_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_priced_recipe(tmp_path, NET, BUDGET)
    here = make_local(tmp_path / "work")
    store, steps = Store(tmp_path / "store"), Steps(quiet=True)
    plain = replace(read_recipe(tmp_path / "net.toml"), budget=Budget(kept_parameters=1.0))
    with open_session(here) as session:
        table = make_table(prepare(plain, tmp_path), choose_place(session, "onnx", 1))
    (tmp_path / "cost-table.json").write_text(encode(table))
    prepared = prepare(read_recipe(tmp_path / "net.toml"), tmp_path)
    with pytest.raises(InputError, match="latency budget of net is not landed on here yet"):
        build_recipe(prepared, store, steps)
    monkeypatch.setattr(land, "ROUNDS", 2)
    with pytest.raises(BudgetInfeasible, match=r"the budget is 1\.0 µs; 1 tries measured"):
        land.land_missing(prepared, store, here, tmp_path, steps)
    monkeypatch.setattr(landing, "has_landed", lambda *_: True)
    land.land_missing(prepared, store, here, tmp_path, steps)
    build, entry = build_recipe(prepared, store, steps)
    assert build.landing is not None
    assert build.landing.verdict == "landed"
    assert build.landing.table_sha256 == digest(table)
    assert build.landing.shipped.predicted_ns == build.plan.total_cost == 280_000 - 90_000 + 9_000
    assert build.plan.factors == {"2": Factors(rank=4)}
    assert build.artifacts[1].source_sha256["costs on here"] == digest(table)
    assert find_build(prepared, store)[1].key == entry.key
    monkeypatch.setattr(land, "open_session", lambda *_, **__: pytest.fail("it was landed before"))
    land.land_missing(prepared, store, here, tmp_path, steps)
    print_build(build, entry)
    assert "Latency budget 1.0 µs in onnx on here: landed" in capsys.readouterr().out
