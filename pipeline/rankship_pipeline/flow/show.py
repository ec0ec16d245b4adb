"""A build in the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankship_pipeline.foundation.console import start_table
from rankship_pipeline.foundation.records import Build, Landing, Refinement
from rankship_pipeline.foundation.store import Entry
from rankship_pipeline.foundation.units import show_bytes, show_count, show_ns, show_percent


def print_build(build: Build, entry: Entry) -> None:
    """Accuracy per stage, the rank plan, other methods at the same budget, and every file with its size."""
    console = Console(highlight=False)
    plan = build.plan
    console.print(
        f"[bold]{escape(build.recipe)}[/]  build {entry.key[:12]}  {show_count(build.dense_parameters)} →"
        f" {show_count(plan.total_parameters)} parameters ({build.dense_parameters / plan.total_parameters:.2f}× fewer;"
        f" budget {show_count(plan.budget_cost)} {plan.unit}, {show_count(plan.gap)} unspent)"
    )
    for line in build.mended:
        console.print(f"mended: {line}", soft_wrap=True, markup=False)
    if build.landing is not None:
        console.print(state_landing(build.landing), markup=False)
    console.print(_accuracies(build))
    if build.fidelities:
        console.print(_fidelities(build))
    if build.refinement is not None:
        console.print(describe_refinement(build.refinement), soft_wrap=True, markup=False)
    console.print(_ranks(build))
    console.print(_files(build))
    console.print(f"in {entry.folder.parent}", soft_wrap=True, markup=False)


def state_landing(landing: Landing) -> str:
    """How a latency budget was met, in one sentence."""
    one, count = landing.shipped, len(landing.tries)
    where = f"{show_ns(landing.budget_ns)} in {landing.format} on {landing.device}"
    if landing.verdict == "dense fits":
        return f"Latency budget {where}: the dense model takes {show_ns(one.measured_ns)}, so nothing was compressed"
    span = f" [{show_ns(one.low_ns)}, {show_ns(one.high_ns)}]" if one.low_ns and one.high_ns else ""
    return (
        f"Latency budget {where}: {landing.verdict}; the table foretold {show_ns(one.predicted_ns)}, measured"
        f" {show_ns(one.measured_ns)}{span}, error {100 * landing.error:+.1f} % after {count}"
        f" {'try' if count == 1 else 'tries'}; dense takes {show_ns(one.dense_ns)} there, ratio {one.ratio:.2f}"
    )


def _accuracies(build: Build) -> Table:
    table = start_table(f"{build.measure} after", "parameters", build.measure, "95 % interval")
    rows = [
        (a.stage, build.plan.total_parameters if a.stage in {"compressed", "refined"} else build.dense_parameters, a)
        for a in build.accuracies
    ]
    rows += [(other.method, other.plan.total_parameters, other.accuracy) for other in build.alternatives]
    for name, parameters, accuracy in rows:
        interval = f"[{show_percent(accuracy.low)}, {show_percent(accuracy.high)}]"
        table.add_row(escape(name), show_count(parameters), show_percent(accuracy.value), escape(interval))
    return table


def _fidelities(build: Build) -> Table:
    """What every specialist keeps: its own test accuracy where known, and agreement on what calibrated the merge."""
    table = start_table("specialist", "after", "own tests before", "own tests after", "agrees on calibration data")
    for one in build.fidelities:
        before, after = ("–" if a is None else show_percent(a.value) for a in (one.before, one.after))
        table.add_row(escape(one.source), one.stage, before, after, show_percent(one.agreement))
    return table


def describe_refinement(taken: Refinement) -> str:
    """One sentence: what is exported, and what refining it took."""
    return (
        f"the compressed files hold the refined model: {show_count(taken.steps)} steps without labels,"
        f" {taken.cpu_seconds:.0f} CPU-seconds, augment = {taken.augment}"
    )


def _ranks(build: Build) -> Table:
    table = start_table("layer", "matrix", "stored as", "parameters", "lost by rank", "lost by merging")
    for layer in build.plan.layers:
        dense = layer.factors is None
        table.add_row(
            escape(layer.name),
            f"{layer.rows}×{layer.columns}",
            str(layer.factors or "dense"),
            show_count(layer.chosen_parameters),
            "–" if dense else show_percent(layer.relative_error),
            "–" if layer.interference is None else show_percent(layer.interference),
        )
    return table


def _files(build: Build) -> Table:
    table = start_table("file", "what", "size")
    for artifact in build.files:
        table.add_row(artifact.file, artifact.key.title, show_bytes(artifact.size_bytes))
    return table
