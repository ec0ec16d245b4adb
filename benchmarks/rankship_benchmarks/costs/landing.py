"""Landing a latency budget: allocate by the device's cost table, measure the whole model there, correct."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rankship_benchmarks.costs.landing_search import Goal, Range, Try, approach, choose_try, find_weight
from rankship_benchmarks.costs.runtime_on_device import WHOLE_MODEL, Place, Subject, choose_place
from rankship_benchmarks.costs.time_table import measure_costs
from rankship_benchmarks.judge.validity import keep_valid, refuse_trials
from rankship_benchmarks.stats.estimates import estimate_median, estimate_ratio, median_by_round
from rankship_pipeline.flow.landed_budget import Priced, is_landed, keep_landing, price_tables
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.rounded import list_precisions, round_model
from rankship_pipeline.flow.show import state_landing
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.artifact_key import WHOLE, describe_timed
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import UnlikeConditions
from rankship_pipeline.foundation.landing import Landing, LandingTry
from rankship_pipeline.foundation.records import CostTable
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.ranks.budget import resolve_budget
from rankship_pipeline.ranks.price import read_table
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
    given = None if budget.costs is None else read_table(prepared.folder / budget.costs, "ns")
    with watching(device), open_session(device, on_news=steps.note) as session:
        format_ = budget.format or prepared.recipe.export.formats[0]
        threads = 1 if given is None else given.threads
        places = [
            choose_place(session, format_, threads, one.part, None if one.part == WHOLE else one.prompt)
            for one in budget.limits
        ]
        if given is None:
            tables = [measure_costs(prepared, store, place, results, steps) for place in places]
        else:
            refuse_foreign(given, places[0], str(budget.costs))
            tables = [given]
        landing = land(prepared, store, places, tables, steps)
    keep_landing(prepared, store, tables, landing)


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


def land(
    prepared: Prepared, store: Store, places: Sequence[Place], tables: Sequence[CostTable], steps: Steps
) -> Landing:
    """Allocate, measure and correct until the compressed model meets the budget (see landing_search.py).

    A budget for both phases has a place and a table for each, in the order of its limits.
    """
    bench = _Bench(price_tables(prepared, tables), store, places, steps)
    goals = bench.list_goals()
    tries, verdict = approach(goals, bench.time_dense(), bench.attempt)
    chosen = choose_try(tries, goals)
    landing, *others = (
        Landing(
            budget_ns=goal.budget_ns,
            device=place.device,
            format=place.format,
            runtime=place.runtime,
            threads=place.threads,
            table_sha256=digest(table),
            rounds=ROUNDS,
            tries=own,
            chosen=chosen,
            verdict=verdict,
            part=place.part,
            prompt_tokens=place.prompt_tokens,
        )
        for goal, place, table, own in zip(goals, places, tables, zip(*tries, strict=True), strict=True)
    )
    if others:
        landing = replace(landing, beside=others[0])
    steps.note(state_landing(landing))
    return landing


@dataclass
class _Bench:
    """One recipe's tries on one device, in each phase that its budget limits."""

    priced: Priced
    store: Store
    places: Sequence[Place]
    steps: Steps
    _tried: set[tuple[int, ...]] = field(default_factory=set)

    def list_goals(self) -> list[Goal]:
        """List the budgets, with the costs of the tables' fastest models and of their dense ones."""
        priced, limits = self.priced, self.priced.prepared.recipe.budget.limits
        return [
            Goal(
                resolve_budget(limit, 0),
                Range(least, table.dense),
                f" for {describe_timed(table.part, table.prompt_tokens)}" if len(limits) > 1 else "",
            )
            for limit, least, table in zip(limits, priced.find_smallest(), priced.tables, strict=True)
        ]

    def time_dense(self) -> Try:
        """Time the dense model by itself, as a try that asks for the whole of each table."""
        costs = tuple(table.dense for table in self.priced.tables)
        weight = None if len(costs) == 1 else 0.5
        return self._time([self._push_dense(place) for place in self.places], costs, costs, weight)

    def attempt(self, asked_ns: tuple[int, ...]) -> Try | None:
        """Allocate `asked_ns` by the tables, build, push, and measure beside the dense model; None for known ranks."""
        priced, prepared = self.priced, self.priced.prepared
        stages, way, weight = Stages(prepared, self.store, self.steps), choose(prepared.recipe), None
        if len(asked_ns) > 1:
            weight = find_weight(asked_ns, lambda one: priced.predict(stages.plan(priced.allow(asked_ns, one), way)))
        allowed = priced.allow(asked_ns, weight)
        stages = replace(stages, prepared=allowed.prepared)
        model, plan = stages.compress(allowed, way)
        predicted = priced.predict(plan)
        if predicted in self._tried:
            return None
        self._tried.add(predicted)
        bits = None
        (precision,) = list_precisions(prepared.recipe, plan)
        if precision != "float32":
            rounded = round_model(stages, model, plan, precision)
            model, bits = rounded.exported, rounded.bits
        compressed = [
            place.push_whole(allowed.prepared, self.store, self.steps, "compressed", model, plan, bits)
            for place in self.places
        ]
        return self._time(compressed, asked_ns, predicted, weight)

    def _push_dense(self, place: Place) -> Subject:
        return place.push_dense(self.priced.prepared, self.store, self.steps)

    def _time(
        self, models: Sequence[Subject], asked_ns: Sequence[int], predicted_ns: Sequence[int], weight: float | None
    ) -> Try:
        """Time a model as it is in each place beside the dense one, the phases in turn."""
        subjects = [[self._push_dense(place), one] for place, one in zip(self.places, models, strict=True)]
        trials: list[list[Trial]] = [[] for _ in self.places]
        device = self.places[0].device
        with self.steps.track(f"time the whole model on {device}", ROUNDS) as advance:
            for number in range(ROUNDS):
                advance(f"time the whole model on {device}")
                for place, own, found in zip(self.places, subjects, trials, strict=True):
                    found.extend(place.time(own if number % 2 == 0 else own[::-1], number, WHOLE_MODEL))
        times = zip(trials, models, asked_ns, predicted_ns, strict=True)
        return tuple(replace(_summarise(device, *one), weight=weight) for one in times)


def _summarise(device: str, trials: list[Trial], model: Subject, asked_ns: int, predicted_ns: int) -> LandingTry:
    """Return a try from the trials of a model beside the dense one; MeasurementError if too few are valid."""
    valid = keep_valid(trials)
    dense = median_by_round(one for one in valid if one.key.variant == "dense")
    last = median_by_round(one for one in valid if one.artifact_sha256 == model.artifact.sha256)
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
