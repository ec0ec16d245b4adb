"""What computed each case on the device, and how much of it a delegate took: for the terminal and the page."""

from collections.abc import Iterable, Iterator
from statistics import median
from typing import TYPE_CHECKING

from rankship_benchmarks.judge.summary import Result, Summary
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.console import start_table
from rankship_pipeline.foundation.delegates import find_facts
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.units import show_ns
from rankship_targets.trials.aggregate import Aggregate, Share

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "nothing"
NONE = "no delegate"
_SHOWN_KINDS = 4
NO_SAMPLES = (
    "its summaries only, in a process that the shell starts. There are no samples, so no interval, ratio or verdict; "
    "and no outputs, so nothing shows that the delegate computes what torch computes."
)
SHARES: dict[Share, str] = {
    "completely": "the whole graph",
    "partially": "a part of the graph",
    "not": "nothing of the graph, as far as the program says: these are the processor's times",
}


@record
class DelegateLine:
    """One case in words: what computes it, how much that takes, what it leaves, and who says so."""

    format: str
    model: str
    variant: str
    title: str
    taken: str
    left: str
    source: str
    alarming: bool


def list_delegated(results: Iterable[Result]) -> list[DelegateLine]:
    """Return a line for every case of which it is known what its delegate takes."""
    return [_describe(one) for one in results if one.delegated is not None]


@record
class AggregateLine:
    """What LiteRT's `benchmark_model` said of one file in all its runs; `runs` is how many, `span` their means."""

    format: str
    model: str
    variant: str
    title: str
    share: str
    mean: str
    span: str
    runs: int
    alarming: bool


def list_aggregates(summary: Summary) -> list[AggregateLine]:
    """Return a line for every file that `benchmark_model` ran with a delegate."""
    groups: dict[ArtifactKey, list[Aggregate]] = {}
    for one in sorted(summary.aggregates, key=lambda one: (one.key.order, one.round)):
        groups.setdefault(one.key, []).append(one)
    return [_join(key, runs) for key, runs in groups.items()]


def state_aggregates(summary: Summary) -> Iterator[str]:
    """Yield what aggregates are and are not, then a line for each; nothing where there is none."""
    lines = list_aggregates(summary)
    if lines:
        yield f"By LiteRT's benchmark_model: {NO_SAMPLES}"
    for one in lines:
        what = f"{one.format} {one.model}: the {one.title} ran {one.share}"
        yield f"{what}; mean {one.mean} {one.span}".strip()


def print_delegates(summary: Summary, console: "Console") -> None:
    """Print how much of each case its delegate takes, and what aggregates there are; nothing where no case has one."""
    for line in state_aggregates(summary):
        console.print(line, markup=False, highlight=False)
    lines = [one for one in list_delegated(summary.results) if one.taken != NONE]
    if not lines:
        return
    table = start_table("format\nmodel", "delegate", "takes", "leaves")
    for one in lines:
        taken = f"[red]{one.taken}[/red]" if one.alarming else one.taken
        table.add_row(f"{one.format}\n{one.model}", one.title, taken, one.left)
    console.print(table)


def _join(key: ArtifactKey, runs: list[Aggregate]) -> AggregateLine:
    means, shares = [one.summary.mean_ns for one in runs], {one.share for one in runs}
    return AggregateLine(
        format=key.format,
        model=key.model,
        variant=key.variant,
        title=find_facts(key).title,
        share=", ".join(SHARES[one] for one in SHARES if one in shares),
        mean=show_ns(round(median(means))),
        span=f"(from {show_ns(min(means))} to {show_ns(max(means))} in {len(runs)} runs)" if len(runs) > 1 else "",
        runs=len(runs),
        alarming="not" in shares,
    )


def _describe(result: Result) -> DelegateLine:
    key, found = result.key, result.delegated
    assert found is not None  # noqa: S101 - only such results are described
    left = sum(found.left.values())
    count = "" if found.operators is None else f"{found.operators} of {found.operators + left} operators, "
    parts = f"{count}{found.partitions} {'partition' if found.partitions == 1 else 'partitions'}"
    kinds = sorted(found.left.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(number for _, number in kinds[_SHOWN_KINDS:])
    more = [f"{rest} others"] if rest else []
    return DelegateLine(
        format=key.format,
        model=key.model,
        variant=key.variant,
        title=find_facts(key).title,
        taken=parts if found.partitions else NOTHING if find_facts(key).takes else NONE,
        left=", ".join([*(f"{number} {kind}" for kind, number in kinds[:_SHOWN_KINDS]), *more]) or NOTHING,
        source=found.source,
        alarming=found.took_nothing,
    )
