"""A profile as a chart: one bar for each operator that takes time, in running order, dense above compressed."""

from collections.abc import Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING

from rankship_benchmarks.measure.profiles import Profile
from rankship_benchmarks.report.charts import ABOVE, COLOURS, INK, draw_svg, time_unit
from rankship_pipeline.foundation.formats import Format

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 0.01  # of all operators' time: smaller ones share one bar
_MOST_ROWS = 40  # per model, the longest ones: more could not be read
_LONGEST_NAME = 34
_ROW_IN, _MARGIN_IN, _WIDTH_IN = 0.21, 1.1, 5.4

Row = tuple[str, float, float, float]  # name; median, first and third quartile in ns


def draw_profile(profiles: Sequence[Profile], format_: Format) -> str:
    """Draw one format's profiles; bars are medians over the profiled inferences, whiskers the quartiles."""
    mine = [one for one in profiles if one.key.format == format_ and one.operators_ns > 0]
    blocks = [(one, list_rows(one)) for one in mine]

    def draw(axes: "Axes") -> None:
        divisor, unit = time_unit(max(row[1] for _, rows in blocks for row in rows))
        place, names = 0, dict[int, str]()
        for profile, rows in blocks:
            colour = COLOURS[profile.key.variant]
            for name, middle, first, third in rows:
                axes.barh(place, middle / divisor, height=0.72, color=colour)
                reach = [[(middle - first) / divisor], [(third - middle) / divisor]]
                axes.errorbar(middle / divisor, place, xerr=reach, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
                names[place] = name
                place += 1
            sum_ = f"{profile.operators_ns / divisor:,.0f} {unit} in {len(profile.operators)} operators"
            axes.barh(place, 0, color=colour, label=f"{profile.key.model}: {sum_}")
            place += 1  # an empty row between the models
        axes.set_yticks(list(names), list(names.values()), fontsize=8)
        axes.set_ylim(place - 1.4, -0.6)
        axes.tick_params(axis="y", length=0, pad=5)
        axes.set_xlim(0, None)
        axes.set_xlabel(f"profiled time of one inference ({unit})\nmedian, middle half of {len(mine[0].inference_ns)}")
        axes.grid(visible=True, axis="x")
        axes.legend(ncols=1, **ABOVE)

    height = _MARGIN_IN + _ROW_IN * sum(len(rows) + 1 for _, rows in blocks)
    return draw_svg(f"profile-{format_}", draw, width_in=_WIDTH_IN, height_in=height) if blocks else ""


def list_rows(profile: Profile) -> list[Row]:
    """List a profile's bars: operators that take at least 1 % of the time, in running order, then the rest as one."""
    least = _SHOWN * profile.operators_ns
    middles = [median(one.ns) for one in profile.operators]
    by_time = sorted(range(len(middles)), key=lambda place: -middles[place])
    shown = sorted(place for place in by_time[:_MOST_ROWS] if middles[place] >= least)
    rows: list[Row] = []
    for place in shown:
        one = profile.operators[place]
        first, middle, third = quantiles(one.ns, n=4, method="inclusive")
        rows.append((_shorten(one.name, one.kind), middle, first, third))
    rest = [middle for place, middle in enumerate(middles) if place not in set(shown)]
    if rest:
        rows.append((f"{len(rest)} others", sum(rest), sum(rest), sum(rest)))
    return rows


def _shorten(name: str, kind: str) -> str:
    text = f"{name} {kind}"
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"
