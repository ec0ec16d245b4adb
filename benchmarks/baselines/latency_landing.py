# ruff: noqa: INP001 - a script, no package
"""Latency budgets landed on a device, compared with allocating by parameters or by operations.

    nice -n 5 python benchmarks/baselines/latency_landing.py RECIPE --shares 0.75,0.6 --out digits.json

Each share makes a budget: that share of the dense model's time in the recipe's cost table. Each landed model is
compared, by parameters and by floating-point operations (same forms, steps and merge), with the model that has as many
of them ("equal"), and with the smallest that answers as many of the first `--test` test inputs correctly ("accurate",
by bisection over the budget). All are then timed in one run, interleaved round by round with the dense model, each
round in one fresh process.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rankship_benchmarks.costs.landing import land
from rankship_benchmarks.costs.runtime_on_device import WHOLE_MODEL, Place, Subject, choose_place
from rankship_benchmarks.costs.time_table import PASSES, measure_costs
from rankship_benchmarks.judge.validity import keep_valid
from rankship_benchmarks.stats.estimates import Estimate, estimate_median, estimate_ratio
from rankship_pipeline import __version__
from rankship_pipeline.evaluate.accuracy import measure_accuracy
from rankship_pipeline.flow.budget import price_recipe
from rankship_pipeline.flow.landed_budget import price_tables
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.flow.stage_model import Model
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.records import CostTable, RankPlan
from rankship_pipeline.foundation.store import Store, default_root
from rankship_pipeline.foundation.toolchain import list_versions
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import Recipe, choose
from rankship_pipeline.recipe.rules import read_recipe
from rankship_targets.devices.device import find_device
from rankship_targets.session.session import open_session

BISECTIONS = 4
ROUNDS = 15


@dataclass(frozen=True)
class Bench:
    """One recipe with everything that its models share; `others` are the budget units compared with measured time."""

    recipe: Recipe
    folder: Path
    store: Store
    place: Place
    steps: Steps
    test: int
    others: tuple[str, ...]

    def prepare(self, budget: Budget) -> Prepared:
        """Prepare the recipe with another budget."""
        return prepare(replace(self.recipe, budget=budget, compare=()), self.folder)

    def count_right(self, model: Model, prepared: Prepared) -> int:
        """Count the right answers among the first test inputs."""
        inputs = tuple(tensor[: self.test] for tensor in prepared.data.test_inputs)
        return measure_accuracy(model.module, inputs, prepared.data.labels[: self.test], stage="test").correct or 0

    def make(self, budgeted: Budgeted) -> tuple[Model, RankPlan]:
        """Make the compressed model; returns it with its plan."""
        prepared = budgeted.prepared
        return Stages(prepared, self.store, self.steps).compress(budgeted, choose(prepared.recipe))

    def equal(self, unit: str, amount: int) -> tuple[Budgeted, Model, RankPlan, int]:
        """Make the model that allocation by a unit gives at a budget in that unit."""
        return self.try_out(replace(self.whole(unit), budget=amount))

    def whole(self, unit: str) -> Budgeted:
        """Prepare the recipe with the dense model's total of a unit as its budget."""
        amount = Budget(kept_parameters=1.0) if unit == "parameters" else Budget(kept_flops=1.0)
        return price_recipe(self.prepare(amount))

    def match(self, unit: str, wanted: int) -> tuple[Budgeted, Model, RankPlan, int]:
        """Find the smallest model by a unit, up to bisection's precision, with at least as many right answers."""
        whole = self.whole(unit)
        low, high = 0.1, 1.0
        found = self.try_out(whole)
        for _ in range(BISECTIONS):
            kept = (low + high) / 2
            try:
                one = self.try_out(replace(whole, budget=int(kept * whole.budget)))
            except BudgetInfeasible:
                low = kept
                continue
            low, high = (low, kept) if one[3] >= wanted else (kept, high)
            found = one if one[3] >= wanted else found
        return found

    def try_out(self, budgeted: Budgeted) -> tuple[Budgeted, Model, RankPlan, int]:
        """Make a model within a budget; returns it with its number of right answers."""
        model, plan = self.make(budgeted)
        return budgeted, model, plan, self.count_right(model, budgeted.prepared)

    def push(self, budgeted: Budgeted, model: Model, plan: RankPlan) -> Subject:
        """Export, prove and push a compressed model."""
        return self.place.push_whole(budgeted.prepared, self.store, self.steps, "compressed", model, plan)


def compare(bench: Bench, table: CostTable, shares: Sequence[float], keep: Callable[[dict[str, Any]], None]) -> None:
    """Land every budget, match every other unit to it, then time all together; results are saved after each."""
    dense = bench.prepare(Budget(kept_parameters=1.0))
    merged, _ = Stages(dense, bench.store, bench.steps).merge(dense.recipe.merge.method)
    subjects = {"dense": bench.place.push_dense(dense, bench.store, bench.steps)}
    by_flops = bench.whole("flops")
    right = bench.count_right(merged, dense)
    told: dict[str, Any] = {"dense": {"right": right, "parameters": dense.dense_parameters, "flops": by_flops.budget}}
    landings: dict[str, Any] = {}
    for share in shares:
        asked = Budget(latency_ms=round(share * table.dense / 1e6, 4), on=bench.place.device)
        prepared = bench.prepare(asked)
        try:
            landing = land(prepared, bench.store, [bench.place], [table], bench.steps)
        except BudgetInfeasible as refused:
            landings[f"{share}"] = {"refused": str(refused)}
            continue
        landings[f"{share}"] = {**json.loads(encode(landing)), "error": landing.error}
        allowed = price_tables(prepared, [table]).allow([landing.shipped.asked_ns])
        model, plan = bench.make(allowed)
        right = bench.count_right(model, prepared)
        name = f"measured {share}"
        subjects[name], told[name] = bench.push(allowed, model, plan), describe(plan, right, by_flops)
        keep({"landings": landings, "models": told})
        amounts = {"parameters": plan.total_parameters, "flops": count_flops(plan, by_flops)}
        for unit in bench.others:
            ways = {"equal": bench.equal(unit, amounts[unit]), "accurate": bench.match(unit, right)}
            for way, (other, model, plan, found) in ways.items():
                name = f"{unit}, {way} {share}"
                subjects[name], told[name] = bench.push(other, model, plan), describe(plan, found, by_flops)
                keep({"landings": landings, "models": told})
    times = time_together(bench, subjects)
    keep({"landings": landings, "models": told, "times": times})


def count_flops(plan: RankPlan, by_flops: Budgeted) -> int:
    """Return the floating-point operations of one sample under a plan."""
    chosen, price = {layer.name: layer.stored for layer in plan.layers}, by_flops.price
    return price.fixed + sum(price.price_layer(layer, chosen[layer.name]) or 0 for layer in by_flops.prepared.layers)


def describe(plan: RankPlan, right: int, by_flops: Budgeted) -> dict[str, Any]:
    """Return a plan's figures."""
    stored = {layer.name: str(layer.factors or "dense") for layer in plan.layers}
    return {
        "right": right,
        "parameters": plan.total_parameters,
        "flops": count_flops(plan, by_flops),
        "cost": plan.total_cost,
        "unit": plan.unit,
        "as": stored,
    }


def time_together(bench: Bench, subjects: dict[str, Subject]) -> dict[str, Any]:
    """Time all in interleaved rounds; ratios pair within a round: to dense, and of other units to the landed model."""
    medians: dict[str, dict[int, float]] = {name: {} for name in subjects}
    names = list(subjects)
    with bench.steps.track("time all together", ROUNDS) as advance:
        for number in range(ROUNDS):
            advance("time all together")
            order = names if number % 2 == 0 else names[::-1]
            taken = bench.place.time([subjects[n] for n in order], number, WHOLE_MODEL)
            for name, trial in zip(order, taken, strict=True):
                if keep_valid([trial]):
                    medians[name][number] = median(trial.samples_ns)
    found: dict[str, Any] = {}
    for name, rounds in medians.items():
        found[name] = {"ns": show(estimate_median(list(rounds.values()))), "medians_ns": rounds}
        found[name]["to dense"] = show(estimate_ratio(rounds, medians["dense"]))
        measured = f"measured {name.rpartition(' ')[2]}"
        if measured in medians and name != measured:
            found[name]["measured to this"] = show(estimate_ratio(medians[measured], rounds))
    return found


def show(estimate: Estimate | None) -> list[float | None]:
    """Return value, low, high."""
    return [] if estimate is None else [estimate.value, estimate.low, estimate.high]


def main() -> int:
    """Measure and write one JSON file with conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--on", default="this-machine")
    parser.add_argument("--format", default="onnx")
    parser.add_argument("--shares", default="0.75,0.6")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--passes", type=int, default=PASSES, help="of the cost table; 1: its even grid alone")
    parser.add_argument("--alone", action="store_true", help="land only, without the other ways to allocate")
    parser.add_argument("--results", type=Path, default=Path("rankship-results"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe, steps, store = read_recipe(arguments.recipe), Steps(), Store(default_root())
    folder = arguments.recipe.resolve().parent
    others = () if arguments.alone else ("parameters", "flops")
    load_before, begun = os.getloadavg(), datetime.now(UTC)

    def keep(found: dict[str, Any]) -> None:
        loads = [round(one, 1) for one in (*load_before, *os.getloadavg())]
        now = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "load before and after": loads}
        known = {
            "recipe": recipe.name,
            "conditions": {**conditions, **now},
            **found,
            "table": json.loads(encode(table)),
        }
        write_atomic(arguments.out, (json.dumps(known, indent=1) + "\n").encode())

    device = find_device(arguments.on)
    with open_session(device, on_news=steps.note) as session:
        place = choose_place(session, arguments.format, 1)
        bench = Bench(recipe, folder, store, place, steps, arguments.test, others)
        probe = session.probe()
        conditions = {
            "begun": begun.isoformat(timespec="seconds"),
            "device": arguments.on,
            **({} if device.twin is None else {"emulated": f"for a {device.twin}: no time of a board"}),
            "processor": probe.cpu_model,
            "cores": probe.cpu_count,
            "runtime": place.runtime,
            "threads": place.threads,
            "test inputs": arguments.test,
            "ranks": {"forms": recipe.ranks.forms, "step": recipe.ranks.step, "passes": arguments.passes},
            "rankship": __version__,
            "python": platform.python_version(),
            **{f"version {name}": version for name, version in list_versions(arguments.format).items()},
        }
        dense = bench.prepare(Budget(kept_parameters=1.0))
        table = measure_costs(dense, store, place, arguments.results, steps, passes=arguments.passes)
        compare(bench, table, [float(share) for share in arguments.shares.split(",")], keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
