"""Prints a build in the terminal."""

from collections.abc import Iterable
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankship_pipeline.foundation.artifact_key import describe_timed
from rankship_pipeline.foundation.console import start_table
from rankship_pipeline.foundation.landing import Landing
from rankship_pipeline.foundation.quality import ACCURACY, Fidelity, Measure, Score
from rankship_pipeline.foundation.records import PLAN_HEADING, Build, RankPlan, Refinement
from rankship_pipeline.foundation.store import Entry
from rankship_pipeline.foundation.units import show_bytes, show_count, show_ns, show_percent
from rankship_pipeline.ranks.losses import list_doubts

COMPRESSED_STAGES = ("compressed", "refined", "int8", "int4")  # their models have the plan's parameters


def print_build(build: Build, entry: Entry) -> None:
    """Print the score of every stage, the rank plan, other methods at the same budget, and every file's size."""
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
        console.print(tabulate_scores(rows, build.measure))
    if build.fidelities:
        console.print(tabulate_fidelities(build.fidelities))
    if build.refinement is not None:
        console.print(describe_refinement(build.refinement), soft_wrap=True, markup=False)
    console.print(tabulate_plan(plan))
    console.print(tabulate_files(build))
    if smaller := describe_smaller(build):
        console.print(smaller, soft_wrap=True, markup=False)
    for line in describe_lengths(build):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"in {entry.folder.parent}", soft_wrap=True, markup=False)


def state_landing(landing: Landing) -> str:
    """How a latency budget was met, in one sentence."""
    count = len(landing.tries)
    limits = " and ".join(f"{show_ns(one.budget_ns)}{_name_phase(one, ' for ')}" for one in landing.phases)
    budget = "Latency budget" if landing.beside is None else "Latency budgets"
    where = f"{budget} {limits} in {landing.format} on {landing.device}"
    if landing.verdict == "dense fits":
        times = " and ".join(show_ns(one.shipped.measured_ns) for one in landing.phases)
        return f"{where}: the dense model takes {times}, so nothing was compressed"
    tries = f"after {count} {'try' if count == 1 else 'tries'}"
    if landing.beside is None:
        return f"{where}: {landing.verdict}; {_state_times(landing, f' {tries}')}"
    told = [f"{_name_phase(one)} {_state_times(one)}" for one in landing.phases]
    return f"{where}: {landing.verdict} {tries}; {'; '.join(told)}"


def _name_phase(landing: Landing, before: str = "") -> str:
    prompt = landing.prompt_tokens
    return "" if prompt is None else f"{before}{describe_timed(landing.part, prompt)}"


def _state_times(landing: Landing, after: str = "") -> str:
    one = landing.shipped
    span = f" [{show_ns(one.low_ns)}, {show_ns(one.high_ns)}]" if one.low_ns and one.high_ns else ""
    return (
        f"predicted {show_ns(one.predicted_ns)}, measured {show_ns(one.measured_ns)}{span}, error"
        f" {100 * landing.error:+.1f} %{after}; the dense model takes {show_ns(one.dense_ns)}, ratio {one.ratio:.2f}"
    )


def describe_size(plan: RankPlan, dense_parameters: int | None) -> str:
    """One sentence: parameters before (if known) and after, the budget, and how much smaller rounded weights are."""
    kept, budget = plan.total_parameters, f"budget {show_count(plan.budget_cost)} {plan.unit}"
    unspent = f"{budget}, {show_count(plan.gap)} unspent"
    if dense_parameters is None:
        return f"{show_count(kept)} parameters ({unspent})"
    fewer = f"{dense_parameters / kept:.2f}× fewer"
    if plan.unit == "bytes":
        fewer += f", {4 * dense_parameters / plan.total_cost:.2f}× smaller than in float32"
    return f"{show_count(dense_parameters)} → {show_count(kept)} parameters ({fewer}; {unspent})"


def tabulate_scores(rows: Iterable[tuple[Score, int]], measure: Measure = ACCURACY) -> Table:
    """The score after each stage, with its interval, further figures and the model's parameters."""
    listed = list(rows)
    also = list(listed[0][0].also) if listed else []
    interval = any(one.low is not None for one, _ in listed)
    headings = ("95 % interval",) if interval else ()
    table = start_table(f"{measure.name} after", "parameters", measure.heading, *headings, *also)
    for one, parameters in listed:
        cells = (escape(one.show_interval()) or "–",) if interval else ()
        further = (f"{one.also[name]:.4g}" if name in one.also else "–" for name in also)
        table.add_row(escape(one.stage), show_count(parameters), one.show(), *cells, *further)
    return table


def tabulate_fidelities(fidelities: Iterable[Fidelity]) -> Table:
    """What every specialist keeps: its test score, if known, and its own outputs on its calibration data."""
    table = start_table("specialist", "after", "own tests before", "own tests after", "on calibration data")
    for one in fidelities:
        before, after = ("–" if a is None else a.show() for a in (one.before, one.after))
        table.add_row(escape(one.source), one.stage, before, after, describe_likeness(one))
    return table


def describe_likeness(one: Fidelity) -> str:
    """How alike a later model's outputs are: "agrees on 98.0 %", else "relative error 3.1 %"."""
    if one.agreement is not None:
        return f"agrees on {show_percent(one.agreement)}"
    return "–" if one.relative_error is None else f"relative error {show_percent(one.relative_error)}"


def describe_refinement(taken: Refinement) -> str:
    """One sentence: the exported files hold the refined model, and what refining took."""
    blocks = " block by block" if taken.by == "blocks" else ""
    return (
        f"the compressed files hold the refined model: {show_count(taken.steps)} steps without labels{blocks},"
        f" {taken.cpu_seconds:.0f} CPU-seconds, augment = {taken.augment}"
    )


def describe_smaller(build: Build) -> str:
    """One sentence: how many times smaller than the dense ones the compressed files are, for each type of weights."""
    dense = {one.key.format: one.size_bytes for one in build.artifacts if one.key.variant == "dense"}
    ratios: dict[str, list[float]] = {}
    for one in build.artifacts:
        if one.key.variant == "compressed" and one.key.format in dense:
            ratios.setdefault(one.key.precision, []).append(dense[one.key.format] / one.size_bytes)
    spans = {name: (f"{min(found):.1f}", f"{max(found):.1f}") for name, found in ratios.items()}
    told = [f"{low if low == high else f'{low} to {high}'} times in {name}" for name, (low, high) in spans.items()]
    return f"files are smaller than dense: {', '.join(told)}" if told else ""


def describe_lengths(build: Build) -> list[str]:
    """One sentence for each format whose files take ranges of lengths, or that has a file for each shape."""
    lines = []
    for name in dict.fromkeys(one.key.format for one in build.artifacts):
        own = [one for one in build.artifacts if one.key.format == name]
        if own[0].dimensions:
            ranges = ", ".join(f"{one.name} {one.low} to {one.high}" for one in own[0].dimensions)
            timed = ", ".join(f"{one.name} {one.example}" for one in own[0].dimensions)
            lines.append(f"{name}: every file takes {ranges}, and is timed with {timed}")
        if shapes := dict.fromkeys(one.key.shape for one in build.shapes if one.key.format == name):
            lines.append(
                f"{name}: a file takes one shape, so there are files for {'; '.join(shapes)} beside those of the data's"
                " own shape, which are timed"
            )
    return lines


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
