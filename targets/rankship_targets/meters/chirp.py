"""Finds the offset between a meter's own clock and the device's from a busy, idle, busy chirp, by edge convolution."""

from itertools import pairwise
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.errors import MeasurementError, TraceGap
from rankship_pipeline.foundation.frozen import record
from rankship_targets.trials.trace import Rail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_RUNNER_UP_SHARE = 0.8  # if a second offset fits nearly as well, the best one is a guess
_EDGE_SHARE = 0.25  # the least height of an edge, as a share of their mean
_STEPS_PER_SAMPLE = 4
_FINE_STEPS = 20
_MOST_STEPS = 2_000_000
_HINT = "make the chirp longer and its two busy parts of different length, and sample faster"


@record
class Alignment:
    """The device's clock plus `offset_ns` is the meter's clock, to within `uncertainty_ns`.

    `edge_uw` is the mean height of the chirp's four edges.
    """

    offset_ns: int
    uncertainty_ns: int
    edge_uw: int


def align_by_chirp(rail: Rail, edges_ns: tuple[int, int, int, int]) -> Alignment:
    """Find the offset at which power rises, falls, rises and falls at the chirp's edges (device clock).

    MeasurementError if no offset fits clearly better than all others; TraceGap if the rail is too short or has gaps.
    """
    import numpy as np

    steps_ns = [after - before for before, after in pairwise(edges_ns)]
    if min(steps_ns) <= 0:
        raise ValueError(f"the chirp's edges {edges_ns} do not rise")
    window_ns = min(steps_ns) / 2
    if rail.gaps:
        raise TraceGap(f"rail {rail.name} has {len(rail.gaps)} gaps, which may hide edges", hint=_HINT)
    span_ns = edges_ns[-1] - edges_ns[0] + 2 * window_ns
    if len(rail.at_ns) < len(edges_ns) or rail.at_ns[-1] - rail.at_ns[0] < span_ns:
        raise TraceGap(f"rail {rail.name} is shorter than the chirp's {span_ns:.0f} ns", hint=_HINT)
    zero_ns = rail.at_ns[0]
    at = np.array([instant - zero_ns for instant in rail.at_ns], dtype=np.float64)
    widest = float(np.diff(at).max())
    if widest > window_ns / 2:
        message = f"rail {rail.name} has samples {widest:.0f} ns apart, the chirp's shortest part is {min(steps_ns)} ns"
        raise MeasurementError(message, hint=_HINT)
    drawn = _accumulate(rail, at)
    edges = np.array([instant - edges_ns[0] for instant in edges_ns], dtype=np.float64)
    lowest, highest = window_ns, at[-1] - edges[-1] - window_ns
    grid_ns = max(float(np.median(np.diff(at))) / _STEPS_PER_SAMPLE, (highest - lowest) / _MOST_STEPS)
    places = np.arange(lowest, highest + grid_ns / 2, grid_ns).clip(max=highest)
    fits = _fit(at, drawn, places, edges, window_ns).mean(axis=0)
    best = float(places[fits.argmax()])
    fine = np.linspace(max(lowest, best - grid_ns), min(highest, best + grid_ns), 2 * _FINE_STEPS + 1)
    close = _fit(at, drawn, fine, edges, window_ns)
    found = float(fine[close.mean(axis=0).argmax()])
    heights = close[:, close.mean(axis=0).argmax()]
    others = fits[np.abs(places - found) > window_ns]
    _check_clear(rail, heights, float(others.max()) if others.size else 0.0)
    return Alignment(
        offset_ns=round(found) + zero_ns - edges_ns[0],
        uncertainty_ns=round(widest + grid_ns / _FINE_STEPS) + rail.lag_ns,
        edge_uw=round(float(heights.mean())),
    )


def _accumulate(rail: Rail, at: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return the energy since the first sample, in uW·ns."""
    import numpy as np

    if rail.power_uw is None:
        return (np.array(rail.energy_uj, dtype=np.float64) - (rail.energy_uj or (0,))[0]) * 1e9
    power = np.array(rail.power_uw, dtype=np.float64)
    return np.concatenate([[0.0], np.cumsum((power[1:] + power[:-1]) / 2 * np.diff(at))])


def _fit(
    at: "NDArray[np.float64]",
    drawn: "NDArray[np.float64]",
    places: "NDArray[np.float64]",
    edges: "NDArray[np.float64]",
    window_ns: float,
) -> "NDArray[np.float64]":
    """Return the height of each edge, in its own direction, for each start of the chirp: [edge, place], in uW.

    An edge's height is the mean power in the window after it minus that in the window before.
    """
    import numpy as np

    rows = []
    for number, edge in enumerate(edges):
        before, here, after = (np.interp(places + edge + shift, at, drawn) for shift in (-window_ns, 0, window_ns))
        rows.append((after - 2 * here + before) / window_ns * (1 if number % 2 == 0 else -1))
    return np.stack(rows)


def _check_clear(rail: Rail, heights: "NDArray[np.float64]", runner_up: float) -> None:
    mean = float(heights.mean())
    if mean <= 0 or float(heights.min()) < _EDGE_SHARE * mean:
        message = f"rail {rail.name} shows no chirp: its best edges are {[round(height) for height in heights]} uW"
        raise MeasurementError(message, hint=_HINT)
    if runner_up > _RUNNER_UP_SHARE * mean:
        message = f"rail {rail.name}: the chirp fits at two times, with edges of {mean:.0f} and {runner_up:.0f} uW"
        raise MeasurementError(message, hint=_HINT)
