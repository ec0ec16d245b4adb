"""Charts as SVG text: labelled with units, intervals as bars, colours safe for the colour-blind (Okabe & Ito 2008).

Text stays text in the SVG and identifiers are reproducible, so the same summary draws the same bytes.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rankship_benchmarks.judge.summary import Result, Summary
from rankship_benchmarks.report.energy_words import energy_unit
from rankship_benchmarks.stats.estimates import CONFIDENCE, Estimate, median_by_round
from rankship_benchmarks.stats.pareto import find_front
from rankship_pipeline.foundation.artifact_key import Precision, Variant
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.quality import Score
from rankship_pipeline.foundation.records import LayerRank, RankPlan
from rankship_pipeline.foundation.units import show_bytes
from rankship_targets.trials.trial import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: dict[Variant, str] = {"dense": "#0072B2", "compressed": "#D55E00"}
MARKERS: dict[Precision, str] = {"float32": "o", "float16": "D", "int8": "s", "int4": "^"}
_LOSS, FAINT, GREY, INK = "#009E73", "#DDE3E8", "#7B8794", "#1F2933"
# Text is laid out in DejaVu Sans, the widest of these, so that it fits in whichever font the viewer has.
_VIEWER_FONTS = "system-ui, 'Segoe UI', Roboto, Arial, 'DejaVu Sans', sans-serif"
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a layer may have $ in its name
    "svg.fonttype": "none",
    "svg.hashsalt": "rankship",
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#E6EAEE",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.4,
}
ABOVE: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.4, 1.0), "handlelength": 1.3}
_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.17)}
_WIDTH_IN, _HEIGHT_IN = 4.9, 3.7
_POINTS = 7.5  # the diameter of a marker
_ROW_IN = 0.27
_DRAWN_QUANTILES = 120
_LOGARITHMIC_FROM = 20
_MEGABYTE = 10**6
_IN_MILLIONS = 10**7  # parameters; below, an axis in thousands has readable numbers
_DRAWN_SHARE = 0.99  # the axis ends where this share of every curve is inside


def draw_accuracy_against_size(summary: Summary) -> str:
    """Draw the score over parameters, with the front; hollow markers are alternatives, which have no artifacts."""
    build = summary.header.build
    points: list[tuple[str, int, Score, str, bool]] = []
    for variant in ("dense", "compressed"):
        found = next((one for one in summary.results if one.key.variant == variant and one.accuracy), None)
        if found and found.accuracy:
            label = "dense" if variant == "dense" else f"compressed: {build.plan.method}"
            points.append((label, found.parameters, found.accuracy, COLOURS[found.key.variant], True))
    points += [(one.method, one.plan.total_parameters, one.accuracy, GREY, False) for one in build.alternatives]
    largest = max((parameters for _, parameters, *_ in points), default=0)
    unit, count = ("millions", 1e6) if largest >= _IN_MILLIONS else ("thousands", 1e3)

    def draw(axes: "Axes") -> None:
        for _, parameters, accuracy, colour, solid in points:
            face = colour if solid else "white"
            bar: dict[str, Any] = {"mfc": face, "mec": colour, "ecolor": colour, "elinewidth": 1.2, "capsize": 3}
            axes.errorbar(
                parameters / count,
                accuracy.measure.scale(accuracy.value),
                yerr=_margins(accuracy),
                fmt="o",
                ms=7.5,
                **bar,
            )
        axes.set_xlim(0, 1.12 * largest / count)
        _draw_front(axes, [(parameters / count, accuracy) for _, parameters, accuracy, _, _ in points])
        axes.set_xlabel(f"parameters ({unit})")
        axes.set_ylabel(_label_score(points[0][2]))
        _label_apart(
            axes, [(label, x / count, accuracy.measure.scale(accuracy.value)) for label, x, accuracy, _, _ in points]
        )
        axes.grid(visible=True)

    return draw_svg("size", draw, height_in=_HEIGHT_IN + 0.75) if points else ""


def draw_accuracy_against_latency(summary: Summary) -> str:
    """Draw the score over median latency, with the front: one marker per artifact; sizes stand in the legend.

    A marker's shape is the type of its weights, its fill the format. The latency axis is logarithmic if the largest
    value is more than 20 times the smallest.
    """
    spent = [(one, one.latency_ns) for one in summary.results if one.key.phase != "prefill"]
    divisor, unit = time_unit(max((time.value for _, time in spent), default=1))
    return _draw_accuracy_against("latency", spent, divisor, f"median latency ({unit}), 95 % interval")


def draw_accuracy_against_bytes(summary: Summary) -> str:
    """Draw the score over the bytes of each file in the same way; empty where all weights are of one type."""
    spent = [
        (one, Estimate(value=one.size_bytes, low=None, high=None, confidence=CONFIDENCE, rounds=0))
        for one in summary.results
        if one.key.phase != "prefill"
    ]
    if len({one.key.precision for one, _ in spent}) == 1:
        return ""
    divisor, unit = (1e6, "MB") if max(size.value for _, size in spent) >= _MEGABYTE else (1e3, "kB")
    return _draw_accuracy_against("bytes", spent, divisor, f"size of the file ({unit})")


def draw_accuracy_against_energy(summary: Summary) -> str:
    """Draw the score over the total energy of an inference in the same way; empty without energy figures."""
    metered = [(one, one.energy.total) for one in summary.results if one.energy and one.key.phase != "prefill"]
    spent = [(one, total.interval) for one, total in metered if total]
    divisor, unit = energy_unit(max((energy.value for _, energy in spent), default=0))
    return _draw_accuracy_against("energy", spent, divisor, f"energy of an inference ({unit}), meter's ± and 95 %")


def _draw_accuracy_against(name: str, spent: Sequence[tuple[Result, Estimate]], divisor: float, label: str) -> str:
    known = [(one, spends, one.accuracy) for one, spends in spent if one.accuracy]
    costs = [spends.value for _, spends, _ in known]

    def draw(axes: "Axes") -> None:
        for one, spends, accuracy in known:
            colour = COLOURS[one.key.variant]
            look: dict[str, Any] = {
                "marker": MARKERS[one.key.precision],
                "fillstyle": FACTS[one.key.format].fill,
                "markerfacecoloralt": "white",
                "ls": "none",
                "color": colour,
            }
            axes.errorbar(
                spends.value / divisor,
                accuracy.measure.scale(accuracy.value),
                xerr=_reach(spends, divisor),
                yerr=_margins(accuracy),
                elinewidth=1.2,
                capsize=3,
                ms=_POINTS,
                alpha=0.85,
                **look,
            )
            title = f"{one.key.heading}, {show_bytes(one.size_bytes)}"
            axes.plot([], [], ms=_POINTS, label=title, **look)
        if max(costs) > _LOGARITHMIC_FROM * min(costs):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        else:
            axes.set_xlim(0, 1.1 * max(costs) / divisor)
        _draw_front(axes, [(spends.value / divisor, accuracy) for _, spends, accuracy in known])
        axes.set_xlabel(label)
        axes.set_ylabel(_label_score(known[0][2]))
        axes.grid(visible=True)
        axes.legend(ncols=2, **_BELOW | {"fontsize": 9})

    return draw_svg(name, draw) if known else ""


def draw_latencies(trials: Sequence[Trial], format_: Format) -> str:
    """Draw the cumulative distribution of latency, one curve per round, with each round's median as a tick at 50 %."""
    timed = [one for one in trials if one.key.format == format_ and one.key.phase != "prefill"]
    mine = [one for one in timed if one.samples_ns and one.key.variant in COLOURS]
    keys = sorted({trial.key for trial in mine}, key=lambda key: key.order)

    def draw(axes: "Axes") -> None:
        import numpy as np

        shares = np.linspace(0, 1, _DRAWN_QUANTILES)
        divisor, unit = time_unit(max(median_by_round(mine).values()))
        for key in keys:
            own = [trial for trial in mine if trial.key == key]
            for trial in own:
                times = np.quantile(trial.samples_ns, shares) / divisor
                axes.plot(times, shares, lw=0.9, alpha=0.45, c=COLOURS[key.variant])
            medians = [value / divisor for value in median_by_round(own).values()]
            label = f"{key.model}: {len(own)} rounds"
            axes.plot(medians, [0.5] * len(medians), "|", ms=17, mew=0.9, c=COLOURS[key.variant], label=label)
        end = 1.04 * max(float(np.quantile(trial.samples_ns, _DRAWN_SHARE)) for trial in mine)
        beyond = sum(sample > end for trial in mine for sample in trial.samples_ns)
        axes.set_xlim(0, end / divisor)
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 1], ["0", "25", "50", "75", "90", "100"])
        count = sum(len(trial.samples_ns) for trial in mine)
        axes.set_xlabel(f"one inference ({unit})\n{beyond:,} of {count:,} lie beyond the axis")
        axes.set_ylabel("inferences at or below (%)")
        axes.grid(visible=True)
        axes.legend(ncols=2, **ABOVE)

    return draw_svg(f"spread-{format_}", draw, width_in=4.0, height_in=3.6) if mine else ""


def draw_ranks(plan: RankPlan) -> str:
    """Draw the share of its parameters that each layer keeps, and its ranks and bits; dense layers are hatched."""

    def draw(axes: "Axes") -> None:
        from matplotlib.patches import Patch

        places = range(len(plan.layers))
        axes.barh(places, 100, height=0.72, color=FAINT)
        for place, layer in zip(places, plan.layers, strict=True):
            kept = 100 * layer.chosen_parameters / layer.dense_parameters
            if layer.factors is None:
                axes.barh(place, kept, height=0.72, facecolor="white", edgecolor=COLOURS["dense"], hatch="////", lw=0.8)
            else:
                axes.barh(place, kept, height=0.72, color=COLOURS["compressed"])
            text = str(layer.stored)
            axes.annotate(text, (100, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_xlim(0, 128)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("parameters kept (%)")
        handles = [
            Patch(color=COLOURS["compressed"], label="kept"),
            Patch(color=FAINT, label="dense size"),
            Patch(facecolor="white", edgecolor=COLOURS["dense"], hatch="////", label="stays dense"),
        ]
        axes.legend(handles=handles, ncols=3, **ABOVE)
        _name_layers(axes, plan.layers)

    return draw_svg("ranks", draw, height_in=_layers_height(plan)) if plan.layers else ""


def draw_errors(plan: RankPlan) -> str:
    """Draw the predicted share of each layer's output energy that its ranks and bits lose."""

    def draw(axes: "Axes") -> None:
        errors = [100 * layer.relative_error for layer in plan.layers]
        axes.hlines(range(len(errors)), 0, errors, color=_LOSS, lw=1.6)
        factored = [place for place, layer in enumerate(plan.layers) if layer.factors is not None]
        dense = [place for place, layer in enumerate(plan.layers) if layer.factors is None]
        axes.plot(
            [errors[place] for place in factored], factored, "o", ms=6.5, c=_LOSS, label="factored", clip_on=False
        )
        hollow: dict[str, Any] = {"mfc": "white", "mec": COLOURS["dense"], "ls": "none", "clip_on": False}
        label = "stays dense" if any(errors[place] for place in dense) else "stays dense: no loss"  # unless rounded
        axes.plot([errors[place] for place in dense], dense, "o", ms=6.5, label=label, **hollow)
        most = max(*errors, 1e-9)
        axes.set_xlim(-0.015 * most, 1.08 * most)
        axes.set_xlabel("output energy lost (%), predicted")
        axes.legend(ncols=2, **ABOVE)
        _name_layers(axes, plan.layers)

    return draw_svg("errors", draw, height_in=_layers_height(plan)) if plan.layers else ""


def draw_svg(
    name: str, draw: Callable[["Axes"], None], *, width_in: float = _WIDTH_IN, height_in: float = _HEIGHT_IN
) -> str:
    """Run `draw` on new axes and return the SVG for an HTML page; `name` makes its identifiers unique there."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=(width_in, height_in))
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", bbox_inches="tight", pad_inches=0.06, transparent=True, metadata=nothing)
    svg = re.sub(r"^.*?(?=<svg )", "", stream.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("'DejaVu Sans'", _VIEWER_FONTS)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)


def _draw_front(axes: "Axes", points: Sequence[tuple[float, Score]]) -> None:
    """Draw the best score at or below each cost, as a staircase behind the points, up to the end of the axis."""
    sign = 1 if points[0][1].measure.higher_is_better else -1
    places = find_front([(cost, sign * score.value) for cost, score in points])
    front = [(points[place][0], points[place][1].measure.scale(points[place][1].value)) for place in places]
    right = axes.get_xlim()[1]
    costs, gains = [cost for cost, _ in front] + [right], [gain for _, gain in front] + [front[-1][1]]
    axes.plot(costs, gains, drawstyle="steps-post", ls=(0, (4, 3)), lw=1.2, c=GREY, zorder=0, label="_front")
    axes.set_xlim(right=right)


def _label_apart(axes: "Axes", points: Sequence[tuple[str, float, float]]) -> None:
    """Write each point's name beside it, moved up or down until no two names touch, with a line to the point."""
    low, high = axes.get_ylim()
    step, right = (high - low) * 0.075, axes.get_xlim()[1]
    lowest = high
    heights: dict[int, float] = {}
    for place in sorted(range(len(points)), key=lambda place: -points[place][2]):
        heights[place] = lowest = min(points[place][2], lowest - step)
    shift = max(0.0, low + step / 2 - min(heights.values()))
    for place, (label, x, y) in enumerate(points):
        left = x > right / 2
        axes.annotate(
            label,
            (x, y),
            (x + right * (-0.06 if left else 0.06), heights[place] + shift),
            ha="right" if left else "left",
            va="center",
            fontsize=9.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},  # the front passes behind a name
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.7, "shrinkA": 1, "shrinkB": 4},
        )


def _name_layers(axes: "Axes", layers: Sequence[LayerRank]) -> None:
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=9)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, pad=7)
    axes.grid(visible=True, axis="x")


def _layers_height(plan: RankPlan) -> float:
    return 0.9 + _ROW_IN * len(plan.layers)


def _margins(score: Score) -> list[list[float]] | None:
    """Return the distances from a score to its interval's low and high end, as the axis has it; None without one."""
    if score.low is None or score.high is None:
        return None
    down, up = (score.measure.scale(max(0.0, one)) for one in (score.value - score.low, score.high - score.value))
    return [[down], [up]]


def _label_score(score: Score) -> str:
    """Return the name of an axis of scores, with its unit, its direction and what the bars are."""
    unit = f" ({score.measure.unit})" if score.measure.unit else ""
    better = "" if score.measure.higher_is_better else ", lower is better"
    return f"{score.measure.name}{unit}{better}" + ("" if score.low is None else ", 95 % interval")


def _reach(spent: Estimate, divisor: float) -> list[list[float]] | None:
    if spent.low is None or spent.high is None:
        return None
    return [[(spent.value - spent.low) / divisor], [(spent.high - spent.value) / divisor]]


def time_unit(longest_ns: float) -> tuple[float, str]:
    """Choose the unit of a time axis: its length in ns, and its symbol."""
    return (1e6, "ms") if longest_ns >= 1e7 else (1e3, "µs")  # noqa: PLR2004 - units.show_ns changes there too
