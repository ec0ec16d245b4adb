"""Accuracy on the device beside the host's, for the terminal and the page."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rankship_benchmarks.measure.device_accuracy import DeviceScore
from rankship_pipeline.foundation.console import start_table
from rankship_pipeline.foundation.units import show_count

if TYPE_CHECKING:
    from rich.console import Console


def print_device_scores(scores: Sequence[DeviceScore], device: str, console: "Console") -> None:
    """Print each case's score on the device beside the host's; nothing where none was taken."""
    if not scores:
        return
    measure = scores[0].device.measure
    table = start_table(f"{measure.heading} of\n{state_part(scores[0])}", "this host", device, "other predictions")
    for one in scores:
        there, here = (f"{score.show()}\n{score.show_interval()}" for score in (one.device, one.host))
        table.add_row(f"{one.key.format}\n{one.key.model}", here, there, show_differing(one))
    console.print(table)


def state_changes(before: Sequence[DeviceScore], after: Sequence[DeviceScore]) -> Iterator[str]:
    """Yield both runs' scores on the device for each case that both scored on the same part; no verdict is made."""
    earlier = {(one.key, one.samples, one.of): one for one in before}
    for one in after:
        other = earlier.get((one.key, one.samples, one.of))
        if other is not None:
            scores = f"{other.device.show()} → {one.device.show()} {one.device.show_interval()}".strip()
            differing = f"{show_differing(other)} → {show_differing(one)}"
            yield f"{one.key.heading} on the device: {scores}; predictions other than the host's: {differing}"


def state_part(score: DeviceScore) -> str:
    """Return which part of the test set was run: "64 of 1,194 test inputs"."""
    return f"{show_count(score.samples)} of {show_count(score.of)} test inputs"


def show_differing(score: DeviceScore) -> str:
    """Return how many predictions differ from the host's; a dash where outputs hold no classes' scores."""
    return "–" if score.differing is None else f"{show_count(score.differing)} of {show_count(score.answers)}"
