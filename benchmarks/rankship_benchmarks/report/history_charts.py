"""A case's history as a chart: one point per night with its interval, gaps for nights that do not count, and steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rankship_benchmarks.report.charts import ABOVE, COLOURS, GREY, INK, draw_svg, time_unit
from rankship_benchmarks.stats.estimates import Estimate, estimate_median
from rankship_benchmarks.stats.steps import Night, Step
from rankship_pipeline.foundation.artifact_key import Variant
from rankship_pipeline.foundation.frozen import record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_NIGHTS = 90
_GAP_COLOUR = "#EEF1F4"
_MOST_TICKS = 7
_LEAST_REACH = 0.06  # the axis reaches at least so far from the median, as its share, so that noise looks small
_USUAL_SPANS = 3  # the axis reaches so many usual interval widths beyond the medians; longer ones are cut
_ABOVE_MOST = 0.3  # so that a point at the end of the axis is whole
_WIDTH_IN, _HEIGHT_IN = 4.6, 2.7


@record
class Point:
    """One night of a chart; `level` is its figure with its interval, None if the night does not count."""

    run_id: str
    started_utc: str
    level: Estimate | None


def draw_history(
    name: str, variant: Variant, nights: Sequence[Night], steps: Sequence[Step], *, noun: str = "night"
) -> str:
    """Draw the last nights' latencies of one case; empty if none of them counts."""
    points = [
        Point(
            run_id=night.run_id,
            started_utc=night.started_utc,
            level=estimate_median(night.rounds_ns) if night.rounds_ns else None,
        )
        for night in nights[-SHOWN_NIGHTS:]
    ]
    divisor, unit = time_unit(max((one.level.value for one in points if one.level), default=1))
    label = f"latency ({unit})"
    return draw_points(name, variant, points, label, steps, divisor=divisor, noun=noun, drawn="median, 95 % interval")


def draw_points(  # noqa: PLR0913 - a chart's own words
    name: str,
    variant: Variant,
    points: Sequence[Point],
    label: str,
    steps: Sequence[Step] = (),
    *,
    divisor: float = 1,
    noun: str = "night",
    drawn: str = "",
    most: float | None = None,
) -> str:
    """Draw the last nights of one figure, whose values are divided by `divisor`; empty if none of them counts.

    A night that does not count is a grey band with a cross at the bottom, and no point. A step is a dashed line before
    its first night, with the ratio of the levels. The axis need not begin at 0, and ends at `most`, the largest
    value that can be. `drawn` says what a point and its bar are.
    """
    shown = list(points)[-SHOWN_NIGHTS:]
    levels = {place: one.level for place, one in enumerate(shown) if one.level is not None}
    if not levels:
        return ""

    def draw(axes: "Axes") -> None:
        _draw_nights(axes, COLOURS[variant], levels, len(shown), divisor, drawn or noun)
        beyond = _fit(axes, list(levels.values()), divisor)
        if most is not None:
            axes.set_ylim(top=min(axes.get_ylim()[1], most + _ABOVE_MOST))
        _draw_gaps(axes, [place for place in range(len(shown)) if place not in levels], noun)
        for step in steps:
            _draw_step(axes, COLOURS[variant], step, shown)
        every = max(1, -(-len(shown) // _MOST_TICKS))
        places = list(range(0, len(shown), every))
        when, which = _name_nights(shown)
        axes.set_xticks(places, [when[place] for place in places])
        axes.set_xlim(-0.6, len(shown) - 0.4)
        more = f"\n{beyond} of {len(levels)} intervals reach beyond the axis" if beyond else ""
        axes.set_xlabel(f"{noun}, by {which}{more}")
        axes.set_ylabel(label)
        axes.grid(visible=True, axis="y")
        axes.legend(ncols=2, **ABOVE)

    return draw_svg(name, draw, width_in=_WIDTH_IN, height_in=_HEIGHT_IN)


def _name_nights(shown: Sequence[Point]) -> tuple[list[str], str]:
    """Label nights by date, or by time of day if they share one date; returns the labels and what they are."""
    dates = [night.started_utc[:10] for night in shown]
    if len(shown) > 1 and len(set(dates)) == 1:
        return [night.started_utc[11:16] for night in shown], f"its time in UTC on {dates[0]}"
    return [date[5:] for date in dates], "its date in UTC (month-day)"


def _draw_nights(
    axes: "Axes", colour: str, levels: dict[int, Estimate], count: int, divisor: float, drawn: str
) -> None:
    """Draw the nights that count, neighbours joined by a line; a gap breaks it."""
    for place, level in levels.items():
        if level.low is not None and level.high is not None:
            axes.vlines(place, level.low / divisor, level.high / divisor, color=colour, lw=1.2)
    middles = [levels[place].value / divisor if place in levels else float("nan") for place in range(count)]
    axes.plot(range(count), middles, "o-", color=colour, lw=1.1, ms=4.5, label=drawn)


def _fit(axes: "Axes", levels: Sequence[Estimate], divisor: float) -> int:
    """Fit the axis to every median and usual interval; returns how many intervals reach beyond it."""
    spans = sorted(level.high - level.low for level in levels if level.low is not None and level.high is not None)
    usual = spans[len(spans) // 2] if spans else 0.0
    values = sorted(level.value for level in levels)
    middle = values[len(values) // 2]
    low = min(values[0] - _USUAL_SPANS * usual, (1 - _LEAST_REACH) * middle)
    high = max(values[-1] + _USUAL_SPANS * usual, (1 + _LEAST_REACH) * middle)
    margin = 0.08 * (high - low)
    low, high = low - margin if values[0] < 0 else max(0.0, low - margin), high + 1.5 * margin
    axes.set_ylim(low / divisor, high / divisor)
    return sum((level.low or low) < low or (level.high or high) > high for level in levels)


def _draw_gaps(axes: "Axes", places: Sequence[int], noun: str) -> None:
    from matplotlib.transforms import blended_transform_factory

    if not places:
        return
    for place in places:
        axes.axvspan(place - 0.5, place + 0.5, color=_GAP_COLOUR, lw=0, zorder=0)
    foot: Any = blended_transform_factory(axes.transData, axes.transAxes)
    axes.plot(
        places, [0.06] * len(places), "x", color=GREY, ms=6, mew=1.4, transform=foot, label=f"{noun} does not count"
    )


def _draw_step(axes: "Axes", colour: str, step: Step, shown: Sequence[Point]) -> None:
    place = next((place for place, night in enumerate(shown) if night.run_id == step.run_id), None)
    if place is None:
        return
    axes.axvline(place - 0.5, color=colour, lw=1.1, ls=(0, (4, 3)))
    left = place > len(shown) / 2
    axes.annotate(
        f"{100 * (step.ratio.value - 1):+.1f} %".replace("-", "\u2212"),
        (place - 0.5, axes.get_ylim()[1]),
        (-4 if left else 4, -3),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=9.5,
        color=INK,
    )
