"""Landing a latency budget: allocate by the device's cost table, measure the whole model there, correct."""

from dataclasses import dataclass, field
from pathlib import Path

from rankship_benchmarks.costs.landing_search import Range, approach, choose_try
from rankship_benchmarks.costs.runtime_on_device import WHOLE_MODEL, Place, Subject, choose_place
from rankship_benchmarks.costs.time_table import measure_costs
from rankship_benchmarks.judge.validity import keep_valid, refuse_trials
from rankship_benchmarks.stats.estimates import estimate_median, estimate_ratio, median_by_round
from rankship_pipeline.flow.budget import price_measured
from rankship_pipeline.flow.landed_budget import allow, is_landed, keep_landing
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.rounded import list_precisions, round_model
from rankship_pipeline.flow.show import state_landing
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.artifact_key import WHOLE
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import UnlikeConditions
from rankship_pipeline.foundation.records import CostTable, Landing, LandingTry
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.ranks.budget import keep_to_method, resolve_budget
from rankship_pipeline.ranks.price import Price, read_table
from rankship_pipeline.recipe.choices import choose
from rankship_targets.devices.device import Device
from rankship_targets.devices.quarantine import watching
from rankship_targets.session.session import open_session
from rankship_targets.trials.trial import Trial

ROUNDS = 9  # of dense and compressed in turn, each in a fresh process


def land_missing(prepared: Prepared, store: Store, device: Device, results: Path, steps: Steps) -> None:
    """Land a recipe's latency budget on its device, unless the store has the result already; keep it there."""
    if is_landed(prepared, store):
        return
    budget = prepared.recipe.budget
    table = None if budget.costs is None else read_table(prepared.folder / budget.costs, "ns")
    with watching(device), open_session(device, on_news=steps.note) as session:
        format_ = budget.format or prepared.recipe.export.formats[0]
        prompt = None if budget.part == WHOLE else budget.prompt
        place = choose_place(session, format_, 1 if table is None else table.threads, budget.part, prompt)
        if table is None:
            table = measure_costs(prepared, store, place, results, steps)
        else:
            refuse_foreign(table, place, str(budget.costs))
        landing = land(prepared, store, place, table, steps)
    keep_landing(prepared, store, table, landing)


def refuse_foreign(table: CostTable, place: Place, where: str) -> None:
    """Raise UnlikeConditions if a table was measured on another device, format, runtime or agent than now."""
    compared = {
        "device": (table.device, place.device),
        "format": (table.format, place.format),
        "runtime": (table.runtime, place.runtime),
        "agent": (table.agent_sha256[:12], place.session.agent_sha256[:12]),
    }
    unlike = [f"{name} {one}, now {other}" for name, (one, other) in compared.items() if one != other]
    if unlike:
        message = f"the costs in {where} were measured under other conditions: {'; '.join(unlike)}"
        raise UnlikeConditions(message, hint="measure them again: `rankship costs`, or leave budget.costs out")


def land(prepared: Prepared, store: Store, place: Place, table: CostTable, steps: Steps) -> Landing:
    """Allocate, measure and correct until the compressed model meets the budget (see landing_search.py)."""
    budget_ns = resolve_budget(prepared.recipe.budget, 0)
    bench = _Bench(prepared, store, place, table, steps)
    tries, verdict = approach(budget_ns, bench.time_dense(), bench.range, bench.attempt)
    landing = Landing(
        budget_ns=budget_ns,
        device=place.device,
        format=place.format,
        runtime=place.runtime,
        threads=place.threads,
        table_sha256=digest(table),
        rounds=ROUNDS,
        tries=tuple(tries),
        chosen=choose_try(tries, budget_ns),
        verdict=verdict,
        part=place.part,
        prompt_tokens=place.prompt_tokens,
    )
    steps.note(state_landing(landing))
    return landing


@dataclass
class _Bench:
    """One recipe's tries on one device."""

    prepared: Prepared
    store: Store
    place: Place
    table: CostTable
    steps: Steps
    _tried: set[int] = field(default_factory=set)

    @property
    def price(self) -> Price:
        """The table's costs of this recipe's layers."""
        return price_measured(self.prepared, self.table, "the table")

    @property
    def range(self) -> Range:
        """The costs of the table's fastest model and of its dense one."""
        price, choice = self.price, keep_to_method(self.prepared.recipe.ranks)
        return Range(price.find_smallest(self.prepared.layers, choice.step, choice.forms), self.table.dense)

    def time_dense(self) -> LandingTry:
        """Time the dense model by itself, as a try that asks for the whole table."""
        return self._time(
            [self.place.push_dense(self.prepared, self.store, self.steps)], self.table.dense, self.table.dense
        )

    def attempt(self, asked_ns: int) -> LandingTry | None:
        """Allocate `asked_ns` by the table, build, push, and measure beside the dense model; None for known ranks."""
        allowed = allow(self.prepared, self.table, asked_ns)
        stages = Stages(allowed.prepared, self.store, self.steps)
        model, plan = stages.compress(allowed, choose(self.prepared.recipe))
        if plan.total_cost in self._tried:
            return None
        self._tried.add(plan.total_cost)
        bits = None
        (precision,) = list_precisions(self.prepared.recipe, plan)
        if precision != "float32":
            rounded = round_model(stages, model, plan, precision)
            model, bits = rounded.exported, rounded.bits
        compressed = self.place.push_whole(allowed.prepared, self.store, self.steps, "compressed", model, plan, bits)
        return self._time(
            [self.place.push_dense(self.prepared, self.store, self.steps), compressed], asked_ns, plan.total_cost
        )

    def _time(self, compressed: list[Subject], asked_ns: int, predicted_ns: int) -> LandingTry:
        subjects = [self.place.push_dense(self.prepared, self.store, self.steps), *compressed]
        trials: list[Trial] = []
        device = self.place.device
        with self.steps.track(f"time the whole model on {device}", ROUNDS) as advance:
            for number in range(ROUNDS):
                advance(f"time the whole model on {device}")
                trials += self.place.time(subjects if number % 2 == 0 else subjects[::-1], number, WHOLE_MODEL)
        valid = keep_valid(trials)
        dense = median_by_round(one for one in valid if one.key.variant == "dense")
        last = median_by_round(one for one in valid if one.artifact_sha256 == subjects[-1].artifact.sha256)
        ratio = estimate_ratio(last, dense)
        if ratio is None:
            raise refuse_trials(f"landing on {device}", trials)
        time = estimate_median(list(last.values()))
        return LandingTry(
            asked_ns=asked_ns,
            predicted_ns=predicted_ns,
            measured_ns=round(time.value),
            low_ns=None if time.low is None else round(time.low),
            high_ns=None if time.high is None else round(time.high),
            dense_ns=round(estimate_median(list(dense.values())).value),
            ratio=ratio.value,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
        )
