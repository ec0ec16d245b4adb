"""The charts of the page of all nights: latencies, tokens a second, energies by device, and scores by model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rankship_benchmarks.nightly.figures import Figure, Figures, draw_rate
from rankship_benchmarks.nightly.histories import Case
from rankship_benchmarks.nightly.records import NightRecord
from rankship_benchmarks.report.history_charts import draw_history, draw_points
from rankship_benchmarks.report.page import Chart
from rankship_benchmarks.stats.steps import Night, find_steps
from rankship_pipeline.foundation.artifact_key import Variant
from rankship_pipeline.foundation.frozen import record

SCORES = "Scores"  # the section of how well the models answer
_MOST_BYTES = 1_700_000  # of charts: the whole page stays below 2 MB


@record
class Section:
    """The charts of one device, or of the scores."""

    name: str
    charts: tuple[Chart, ...]


def draw_sections(
    night: NightRecord, histories: Mapping[Case, Sequence[Night]], figures: Figures
) -> tuple[list[Section], list[str]]:
    """Draw worse cases first, then energies and scores, until the page is full.

    Returns the sections, by device and then scores, and the names of the charts left out.
    """
    worse = {(one.shown, case.key) for one in night.devices for case in one.cases if case.verdict == "worse"}
    mine = [case for case in histories if case.recipe == night.recipe]
    planned = {case: [_plan_history(f"history-{place}", histories[case], case)] for place, case in enumerate(mine)}
    for place, case in enumerate(mine):
        extra = [draw_rate(histories[case])] if case.key.phase == "decode" else []
        extra += [figures.energies[case]] if case in figures.energies else []
        planned[case] += [_plan_figure(f"history-{place}-{number}", one, case) for number, one in enumerate(extra)]
    scores = [_plan_score(f"score-{place}", *one) for place, one in enumerate(figures.scores.items())]
    order = sorted(mine, key=lambda case: (case.device, case.key) not in worse)
    first, more = [planned[case][0] for case in order], [one for case in order for one in planned[case][1:]]
    room, drawn, undrawn = _MOST_BYTES, dict[str, Chart](), list[str]()
    for plan in (*first, *scores, *more):
        svg = "" if undrawn else plan.draw()
        if undrawn or len(svg.encode()) > room:
            undrawn.append(plan.title)
        elif svg:
            room -= len(svg.encode())
            drawn[plan.name] = Chart(heading=plan.heading, reading=plan.reading, svg=svg)
    groups = [
        (device, [plan for case in mine if case.device == device for plan in planned[case]])
        for device in dict.fromkeys(case.device for case in mine)
    ]
    groups.append((SCORES, scores))
    charts = [(name, tuple(drawn[plan.name] for plan in plans if plan.name in drawn)) for name, plans in groups]
    return [Section(name=name, charts=some) for name, some in charts if some], undrawn


@dataclass(frozen=True)
class _Plan:
    """A chart to draw: its name in the page, what the list of undrawn ones calls it, its words, and how."""

    name: str
    title: str
    heading: str
    reading: str
    draw: Callable[[], str]


def _plan_history(name: str, nights: Sequence[Night], case: Case) -> _Plan:
    steps = find_steps(nights)
    return _Plan(
        name=name,
        title=f"{case.device} {case.key.heading}",
        heading=f"{case.key.format}, {case.key.model}",
        reading=_read(nights, len(steps)),
        draw=lambda: draw_history(name, case.key.variant, nights, steps),
    )


def _plan_figure(name: str, figure: Figure, case: Case) -> _Plan:
    counted = sum(one.level is not None for one in figure.points)
    return _Plan(
        name=name,
        title=f"{figure.name} of {case.device} {case.key.heading}",
        heading=f"{case.key.format}, {case.key.model}: {figure.name}",
        reading=f"{counted} of {len(figure.points)} nights have it.",
        draw=lambda: draw_points(name, case.key.variant, figure.points, figure.axis, drawn=figure.drawn),
    )


def _plan_score(name: str, model: str, figure: Figure) -> _Plan:
    variant: Variant = "dense" if model.startswith("dense") else "compressed"
    return _Plan(
        name=name,
        title=f"{figure.name} of {model}",
        heading=model,
        reading=f"{figure.name} of the torch model behind the files, for all formats and devices.",
        draw=lambda: draw_points(name, variant, figure.points, figure.axis, drawn=figure.drawn, most=figure.most),
    )


def _read(nights: Sequence[Night], steps: int) -> str:
    counted = sum(bool(night.rounds_ns) for night in nights)
    found = {0: "no lasting step", 1: "one lasting step"}.get(steps, f"{steps} lasting steps")
    return f"{counted} of {len(nights)} nights count; {found}."
