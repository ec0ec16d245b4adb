"""Prints a build in the terminal."""

from collections.abc import Iterable
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankship_pipeline.foundation.console import start_table
from rankship_pipeline.foundation.records import (
    PLAN_HEADING,
    Accuracy,
    Build,
    Fidelity,
    Landing,
    RankPlan,
    Refinement,
)
from rankship_pipeline.foundation.store import Entry
from rankship_pipeline.foundation.units import show_bytes, show_count, show_ns, show_percent
from rankship_pipeline.ranks.losses import list_doubts

COMPRESSED_STAGES = ("compressed", "refined")  # their models have the plan's parameters


def print_build(build: Build, entry: Entry) -> None:
    """Print the accuracy of every stage, the rank plan, other methods at the same budget, and every file's size."""
    console = Console(highlight=False)
    plan = build.plan
    size = describe_size(plan, build.dense_parameters)
    console.print(f"[bold]{escape(build.recipe)}[/]  build {entry.key[:12]}  {size}")
    for line in build.mended:
        console.print(f"note: {line}", soft_wrap=True, markup=False)
    for line in list_doubts(plan):
        console.print(f"note: {line}", soft_wrap=True, markup=False)
    if build.landing is not None:
        console.print(state_landing(build.landing), markup=False)
    sizes = dict.fromkeys(COMPRESSED_STAGES, plan.total_parameters)
    rows = [(one, sizes.get(one.stage, build.dense_parameters)) for one in build.accuracies]
    rows += [(replace(one.accuracy, stage=one.method), one.plan.total_parameters) for one in build.alternatives]
    if rows:
        console.print(tabulate_accuracies(rows, build.measure))
    if build.fidelities:
        console.print(tabulate_fidelities(build.fidelities))
    if build.refinement is not None:
        console.print(describe_refinement(build.refinement), soft_wrap=True, markup=False)
    console.print(tabulate_plan(plan))
    console.print(tabulate_files(build))
    console.print(f"in {entry.folder.parent}", soft_wrap=True, markup=False)


def state_landing(landing: Landing) -> str:
    """How a latency budget was met, in one sentence."""
    one, count = landing.shipped, len(landing.tries)
    where = f"{show_ns(landing.budget_ns)} in {landing.format} on {landing.device}"
    if landing.verdict == "dense fits":
        return f"Latency budget {where}: the dense model takes {show_ns(one.measured_ns)}, so nothing was compressed"
    span = f" [{show_ns(one.low_ns)}, {show_ns(one.high_ns)}]" if one.low_ns and one.high_ns else ""
    return (
        f"Latency budget {where}: {landing.verdict}; predicted {show_ns(one.predicted_ns)}, measured"
        f" {show_ns(one.measured_ns)}{span}, error {100 * landing.error:+.1f} % after {count}"
        f" {'try' if count == 1 else 'tries'}; the dense model takes {show_ns(one.dense_ns)}, ratio {one.ratio:.2f}"
    )


def describe_size(plan: RankPlan, dense_parameters: int | None) -> str:
    """One sentence: parameters before (if known) and after, and the budget."""
    kept, budget = plan.total_parameters, f"budget {show_count(plan.budget_cost)} {plan.unit}"
    unspent = f"{budget}, {show_count(plan.gap)} unspent"
    if dense_parameters is None:
        return f"{show_count(kept)} parameters ({unspent})"
    fewer = f"{dense_parameters / kept:.2f}× fewer"
    return f"{show_count(dense_parameters)} → {show_count(kept)} parameters ({fewer}; {unspent})"


def tabulate_accuracies(rows: Iterable[tuple[Accuracy, int]], measure: str = "accuracy") -> Table:
    """The share of correct answers after each stage, with its interval and the model's parameters."""
    table = start_table(f"{measure} after", "parameters", measure, "95 % interval")
    for one, parameters in rows:
        interval = f"[{show_percent(one.low)}, {show_percent(one.high)}]"
        table.add_row(escape(one.stage), show_count(parameters), show_percent(one.value), escape(interval))
    return table


def tabulate_fidelities(fidelities: Iterable[Fidelity]) -> Table:
    """What every specialist keeps: its test accuracy, if known, and the agreement on its calibration data."""
    table = start_table("specialist", "after", "own tests before", "own tests after", "agrees on calibration data")
    for one in fidelities:
        before, after = ("–" if a is None else show_percent(a.value) for a in (one.before, one.after))
        table.add_row(escape(one.source), one.stage, before, after, show_percent(one.agreement))
    return table


def describe_refinement(taken: Refinement) -> str:
    """One sentence: the exported files hold the refined model, and what refining took."""
    return (
        f"the compressed files hold the refined model: {show_count(taken.steps)} steps without labels,"
        f" {taken.cpu_seconds:.0f} CPU-seconds, augment = {taken.augment}"
    )


def tabulate_plan(plan: RankPlan) -> Table:
    """Every factorable layer: how it is stored, and what it loses by its rank and by merging."""
    table = start_table(*PLAN_HEADING)
    for layer in plan.layers:
        table.add_row(*map(escape, layer.cells))
    return table


def tabulate_files(build: Build) -> Table:
    """Every exported file with its size."""
    table = start_table("file", "what", "size")
    for artifact in build.files:
        table.add_row(artifact.file, artifact.key.title, show_bytes(artifact.size_bytes))
    return table
