"""A build in the terminal."""

from rich.console import Console
from rich.table import Table

from rankship_pipeline.records import Build
from rankship_pipeline.store import Entry
from rankship_pipeline.units import show_bytes, show_count, show_percent


def print_build(build: Build, entry: Entry) -> None:
    """Accuracy per stage, the rank plan, other methods at the same budget, and every file with its size."""
    console = Console(highlight=False)
    plan = build.plan
    console.print(
        f"[bold]{build.recipe}[/]  build {entry.key[:12]}  {show_count(build.dense_parameters)} →"
        f" {show_count(plan.total_parameters)} parameters ({build.dense_parameters / plan.total_parameters:.2f}× fewer;"
        f" budget {show_count(plan.budget_parameters)}, {plan.gap} unspent)"
    )
    console.print(_accuracies(build))
    console.print(_ranks(build))
    console.print(_files(build))
    console.print(f"in {entry.folder.parent}")


def _accuracies(build: Build) -> Table:
    table = Table(title="accuracy", title_justify="left")
    for heading in ("stage", "parameters", "accuracy", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    rows = [
        (a, build.plan.total_parameters if a.stage == "compressed" else build.dense_parameters)
        for a in build.accuracies
    ]
    rows += [(alternative.accuracy, alternative.plan.total_parameters) for alternative in build.alternatives]
    for accuracy, parameters in rows:
        table.add_row(
            accuracy.stage,
            show_count(parameters),
            show_percent(accuracy.value),
            f"{show_percent(accuracy.low)} – {show_percent(accuracy.high)}",
        )
    return table


def _ranks(build: Build) -> Table:
    table = Table(title="ranks", title_justify="left")
    for heading in ("layer", "matrix", "rank", "parameters", "lost by rank", "lost by merging"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in build.plan.layers:
        table.add_row(
            layer.name,
            f"{layer.rows}×{layer.columns}",
            "dense" if layer.rank is None else str(layer.rank),
            f"{show_count(layer.dense_parameters)} → {show_count(layer.chosen_parameters)}"
            if layer.rank
            else show_count(layer.dense_parameters),
            "–" if layer.rank is None else show_percent(layer.relative_error),
            "–" if layer.interference is None else show_percent(layer.interference),
        )
    return table


def _files(build: Build) -> Table:
    table = Table(title="files", title_justify="left")
    for heading in ("variant", "format", "size", "file"):
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for artifact in build.artifacts:
        table.add_row(artifact.variant, artifact.format, show_bytes(artifact.size_bytes), artifact.file)
    return table
