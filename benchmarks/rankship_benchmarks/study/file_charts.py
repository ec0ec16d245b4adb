"""The charts of a study's files: quality against bytes and against latency, a marker's shape its fewest bits."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rankship_benchmarks.report.charts import GREY, MARKERS, draw_svg, time_unit
from rankship_benchmarks.study.charts import COLOURS, HEADINGS, OURS
from rankship_benchmarks.study.file_lines import FileLine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_THOUSAND = 1000


def draw_against_bytes(lines: Sequence[FileLine]) -> str:
    """Draw mean quality and its range over the bytes of the file, on a logarithmic axis."""
    return _draw("bytes", lines, lambda line: line.size_bytes / _THOUSAND, "bytes of the file (kB)")


def draw_against_latency(lines: Sequence[FileLine]) -> str:
    """Draw it over the median latency of an inference, of the files that were timed; empty without any."""
    timed = [line for line in lines if line.latency_ns is not None]
    divisor, unit = time_unit(max((line.latency_ns.value for line in timed if line.latency_ns), default=1))

    def read(line: FileLine) -> float:
        return line.latency_ns.value / divisor if line.latency_ns else 0.0

    return _draw("latency", timed, read, f"median latency ({unit})") if timed else ""


def _draw(name: str, lines: Sequence[FileLine], read: Callable[[FileLine], float], label: str) -> str:
    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import LogFormatter

        names = list(dict.fromkeys(line.name for line in lines))
        others = [one for one in names if not any(line.ours for line in lines if line.name == one)]
        for one in names:
            mine = sorted((line for line in lines if line.name == one), key=read)
            ours = one not in others
            colour = OURS if ours else COLOURS[others.index(one) % len(COLOURS)]
            style: dict[str, Any] = {"color": colour, "lw": 2.4 if ours else 1.2}
            axes.plot([read(line) for line in mine], [line.quality for line in mine], label=one, **style)
            for line in mine:
                reach = [[max(0.0, line.quality - line.low)], [max(0.0, line.high - line.quality)]]
                bar: dict[str, Any] = {"fmt": MARKERS[line.precision], "ms": 6, "elinewidth": 1, "capsize": 2}
                axes.errorbar(read(line), line.quality, yerr=reach, color=colour, **bar)
        for precision in dict.fromkeys(line.precision for line in lines):
            axes.plot([], [], MARKERS[precision], mfc="white", mec=GREY, label=f"fewest bits: {precision}")
        axes.axhline(lines[0].dense, color=GREY, lw=1, ls=":")
        axes.set_xscale("log")
        if lines[0].unit == "perplexity":
            axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis) if lines[0].unit == "perplexity" else (axes.xaxis,):
            axis.set_major_formatter(LogFormatter(labelOnlyBase=False))  # plain numbers: no mathematics is drawn
            axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        axes.set_xlabel(label)
        axes.set_ylabel(HEADINGS.get(lines[0].unit, lines[0].unit))
        axes.grid(visible=True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9)

    return draw_svg(f"{name}-{lines[0].subject}", draw, width_in=5.4, height_in=4.4)
