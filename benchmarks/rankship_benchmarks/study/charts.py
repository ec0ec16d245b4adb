"""A study's charts as SVG: quality against size for every method, and what each layer keeps and loses in ours."""

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from rankship_benchmarks.report.charts import ABOVE, FAINT, GREY, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rankship_benchmarks.study.lines import Line

# Okabe & Ito 2008, safe for the colour-blind; ours is vermilion and thick, markers distinguish the rest in print.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#555555")
OURS = "#D55E00"
_MARKERS = "osv^D<>PX*hd"
HEADINGS = {"perplexity": "perplexity (lower is better)", "%": "right answers (%)"}  # unit → label of the axis


def draw_quality(lines: Sequence["Line"]) -> str:
    """Draw mean quality and its range over the share of parameters kept; perplexity on a logarithmic axis."""
    from matplotlib.ticker import LogFormatter

    def draw(axes: "Axes") -> None:
        names = list(dict.fromkeys(line.name for line in lines))
        others = 0
        for place, name in enumerate(names):
            mine = sorted((line for line in lines if line.name == name), key=lambda line: line.parameters)
            ours = mine[0].ours
            colour = OURS if ours else COLOURS[others % len(COLOURS)]
            others += not ours
            sizes = [line.parameters / line.cells[0].dense_parameters for line in mine]
            middle = [line.quality for line in mine]
            reach = [[line.quality - line.low for line in mine], [line.high - line.quality for line in mine]]
            style = "--" if mine[0].refined else "-"
            axes.errorbar(
                sizes,
                middle,
                yerr=[[max(0.0, one) for one in side] for side in reach],
                label=name,
                color=colour,
                marker=_MARKERS[place % len(_MARKERS)],
                ms=5,
                lw=2.4 if ours else 1.2,
                ls=style,
                capsize=2,
            )
        specialists = lines[0].specialists.values()
        top, name = (mean(specialists), "specialists") if specialists else (lines[0].dense, "dense")
        axes.axhline(top, color=GREY, lw=1, ls=":")
        axes.annotate(name, (1, top), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        if lines[0].unit == "perplexity":
            axes.set_yscale("log")
            for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                which(LogFormatter(labelOnlyBase=False))  # plain numbers: the page's charts draw no mathematics
        axes.set_xlabel("share of all parameters kept")
        axes.set_ylabel(HEADINGS.get(lines[0].unit, lines[0].unit))
        axes.grid(visible=True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9)

    return draw_svg(f"quality-{lines[0].subject}", draw, width_in=5.4, height_in=4.4)


def draw_layers(lines: Sequence["Line"]) -> str:
    """Draw the share of its parameters that every layer keeps, one colour per budget."""

    def draw(axes: "Axes") -> None:
        layers = lines[0].cells[0].plan.layers
        height = 0.8 / len(lines)
        for place, line in enumerate(lines):
            kept = [100 * one.chosen_parameters / one.dense_parameters for one in line.cells[0].plan.layers]
            spots = [index + place * height for index in range(len(layers))]
            axes.barh(spots, kept, height=height, color=COLOURS[place % len(COLOURS)], label=f"{line.kept:.3g}")
        _name(axes, [one.name for one in layers])
        axes.set_xlabel("parameters kept (%)")
        axes.legend(ncols=len(lines), title="budget", **ABOVE)

    return draw_svg(f"layers-{lines[0].subject}", draw, height_in=1.2 + 0.3 * len(lines[0].cells[0].plan.layers))


def draw_errors(lines: Sequence["Line"]) -> str:
    """Draw the share of each layer's output energy that its factors discard."""

    def draw(axes: "Axes") -> None:
        layers = lines[0].cells[0].plan.layers
        axes.hlines(range(len(layers)), 0, 1, color=FAINT, lw=0.8, transform=axes.get_yaxis_transform())
        for place, line in enumerate(lines):
            lost = [100 * one.relative_error for one in line.cells[0].plan.layers]
            colour, marker = COLOURS[place % len(COLOURS)], _MARKERS[place]
            axes.plot(lost, range(len(layers)), marker, ms=5, color=colour, label=f"{line.kept:.3g}", clip_on=False)
        _name(axes, [one.name for one in layers])
        axes.set_xlim(left=0)
        axes.set_xlabel("output energy lost (%), predicted")
        axes.legend(ncols=len(lines), title="budget", **ABOVE)

    return draw_svg(f"errors-{lines[0].subject}", draw, height_in=1.2 + 0.3 * len(lines[0].cells[0].plan.layers))


def _name(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
