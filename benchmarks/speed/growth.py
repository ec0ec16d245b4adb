"""How the cost grows with the model: CPU seconds of calibrating and compressing encoders of many sizes."""

from collections.abc import Sequence
from math import log
from statistics import linear_regression, median
from typing import TYPE_CHECKING

from rankship_benchmarks.report.charts import GREY, draw_svg
from rankship_pipeline.models.layers import count_parameters
from speed.nets import Shape, make_inputs, make_net
from speed.ours import compress
from speed.records import Figure, Measured, make_figure
from speed.timing import CPU_EFFECT, spend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT = 0.5
# Width and depth of each encoder: 0.3, 1.3, 6.8, 29 and 130 million parameters.
STEPS = ((64, 5), (128, 6), (256, 8), (512, 9), (896, 13))
BAR = 1.5
_SLOPE_EFFECT = 0.05
_MILLION = 1e6


def measure_growth(rounds: int, *, steps: int, samples: int, tokens: int) -> Measured:
    """Time the first so many sizes on as many samples each; `slope` is that of log seconds over log parameters."""
    figures: list[Figure] = []
    sizes: list[int] = []
    rows: list[list[float]] = []
    for width, depth in STEPS[:steps]:
        shape = Shape("bert", width, (depth,), tokens=tokens, words=1000, classes=2)
        model, inputs = make_net(shape), make_inputs(shape, samples)
        if not sizes:
            compress(model, inputs, KEPT)  # what torch sets up once does not count
        sizes.append(count_parameters(model))
        rows.append([spend(lambda: compress(model, inputs, KEPT)).cpu_s for _ in range(rounds)])  # noqa: B023 - runs at once
        figures.append(make_figure(f"ours_cpu_s {sizes[-1]}", "s", rows[-1], CPU_EFFECT))
    slopes = [fit_slope(sizes, [row[number] for row in rows]) for number in range(rounds)]
    return Measured(
        figures=(make_figure("slope", "log s / log parameters", slopes, _SLOPE_EFFECT), *figures),
        parameters={"samples": str(samples), "tokens": str(tokens), "kept_parameters": str(KEPT)},
    )


def fit_slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the least-squares slope of log seconds over log sizes."""
    return linear_regression([log(one) for one in sizes], [log(one) for one in seconds]).slope


def read_points(figures: Sequence[Figure]) -> list[tuple[int, Figure]]:
    """Return the parameters and the seconds of every size that was measured."""
    return [(int(one.name.split()[1]), one) for one in figures if one.name.startswith("ours_cpu_s ")]


def draw_growth(measured: Measured) -> str:
    """Draw seconds over parameters on logarithmic axes, beside the slope that the bar allows; SVG."""
    points = read_points(measured.figures)
    slope = next(one for one in measured.figures if one.name == "slope").value

    def draw(axes: "Axes") -> None:
        sizes = [size / _MILLION for size, _ in points]
        seconds = [figure.value for _, figure in points]
        for size, figure in zip(sizes, (figure for _, figure in points), strict=True):
            axes.plot([size] * len(figure.samples), figure.samples, ".", c="#D55E00", alpha=0.4)
        axes.plot(sizes, seconds, "o-", c="#D55E00", label=f"Rankship: slope {slope:.2f}")
        allowed = [seconds[0] * (size / sizes[0]) ** BAR for size in sizes]
        axes.plot(sizes, allowed, "--", c=GREY, label=f"slope {BAR}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("parameters (millions)")
        axes.set_ylabel("calibrate and compress (CPU seconds)")
        axes.grid(visible=True)
        axes.legend()

    return draw_svg("growth", draw) if median(size for size, _ in points) else ""
