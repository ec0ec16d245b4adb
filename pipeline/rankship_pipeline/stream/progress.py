"""Shows how far a pass over many blocks is, and about how long the rest will take."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.units import show_seconds

Begin = Callable[[str, str, int], None]  # called with a stage's name, that of the part that begins, and the parts left


def ignore(_stage: str, _part: str, _left: int) -> None:
    """Show nothing."""


@contextmanager
def track_stages(steps: Steps) -> Iterator[Begin]:
    """Yield a function that shows a bar for each stage as its first part begins.

    Where no bar can be seen, it prints a line for each part, with about the time that the stage's others will take.
    """
    with ExitStack() as stack:
        running: tuple[str, Callable[[str], None], float, int] | None = None

        def begin(stage: str, part: str, left: int) -> None:
            nonlocal running
            if running is None or running[0] != stage:
                stack.close()
                running = (stage, stack.enter_context(steps.track(stage, left)), time.monotonic(), left)
            _, advance, begun, total = running
            advance(part)
            done = total - left
            if not steps.console.is_terminal:
                each = (time.monotonic() - begun) / max(1, done)
                steps.note(
                    f"{part}; {left} left, about {show_seconds(each * left)}" if done else f"{part}; {left} left"
                )

        yield begin
