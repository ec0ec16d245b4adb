"""A result as text."""

from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.quality import Fidelity, Score
from rankship_pipeline.foundation.records import RankPlan, Refinement
from rankship_pipeline.foundation.units import show_count, show_percent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    Part = str | RenderableType | Callable[[Console], None]  # a callable prints to the console it is given

_WIDTH = 160  # characters of a line at most


def describe_result(
    plan: RankPlan | None,
    dense_parameters: int | None,
    fidelities: Sequence[Fidelity],
    accuracies: Sequence[Score],
    interference: Mapping[str, float],
    refinement: Refinement | None = None,
) -> str:
    """Parameters before and after, scores, agreement, and what every layer loses."""
    from rankship_pipeline.flow.show import (
        COMPRESSED_STAGES,
        describe_refinement,
        describe_size,
        tabulate_fidelities,
        tabulate_plan,
        tabulate_scores,
    )

    parts: list[Part] = []
    if plan is None:
        parts.append(f"{show_count(dense_parameters or 0)} parameters")
    else:
        parts.append(describe_size(plan, dense_parameters))
    if accuracies:
        dense = dense_parameters or 0  # known wherever there are accuracies
        sizes = {} if plan is None else dict.fromkeys(COMPRESSED_STAGES, plan.total_parameters)
        parts.append(tabulate_scores([(one, sizes.get(one.stage, dense)) for one in accuracies], accuracies[0].measure))
    if fidelities:
        parts.append(tabulate_fidelities(fidelities))
    if refinement is not None:
        parts.append(describe_refinement(refinement))
    if plan is not None:
        parts.append(tabulate_plan(plan))
    elif interference:
        parts.append(_tabulate_interference(interference))
    return render(parts)


def render(parts: "Sequence[Part]") -> str:
    """Lines and tables as plain text."""
    from rich.console import Console

    console = Console(
        file=StringIO(), width=_WIDTH, highlight=False, markup=False, force_terminal=False, force_jupyter=False
    )
    for part in parts:
        if callable(part):
            part(console)
        else:
            console.print(part, soft_wrap=isinstance(part, str))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    return "\n".join(line.rstrip() for line in text.splitlines())


def _tabulate_interference(interference: Mapping[str, float]) -> "RenderableType":
    from rich.markup import escape

    from rankship_pipeline.foundation.console import start_table

    table = start_table("layer", "lost by merging")
    for name, share in interference.items():
        table.add_row(escape(name), show_percent(share))
    return table
