"""Shows progress on stderr: a live line on a terminal or in a notebook, else one line per finished step."""

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from rankship_pipeline.foundation import profile

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID


class Steps:
    """Shows each step while it runs and its wall time when it is done; `seconds` keeps the times.

    `on_part` is called with the name of each part of tracked work as it begins; what it raises ends the work there.
    """

    def __init__(self, *, quiet: bool = False, on_part: Callable[[str], None] = lambda _: None) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.seconds: dict[str, float] = {}
        self._shared: Progress | None = None
        self._prefix = ""
        self._on_part = on_part
        # a notebook needs ipywidgets for a live line; without them each step is one line, when it is done
        self._is_live = not self.console.is_jupyter or importlib.util.find_spec("ipywidgets") is not None

    @contextmanager
    def side_by_side(self) -> Iterator[Callable[[str], "Steps"]]:
        """Show several workers at once, each on its own lines; yields a function that makes a named worker's Steps."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self._is_live) as progress:

            def start(name: str) -> Steps:
                steps = Steps()
                steps.console, steps._shared, steps._prefix = self.console, progress, f"{name}: "
                return steps

            yield start

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show `name` as running, then as done."""
        if self._shared is not None:
            with self._timed(name), self._bar(name, None):
                yield
        else:
            with self._timed(name), self.console.status(escape(name)) if self._is_live else nullcontext():
                yield

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """Show a bar over `total` parts; yields a function to call with a part's name as that part begins."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        name_column = TextColumn("{task.description}", markup=False)
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left"))
        columns = (name_column, BarColumn(), MofNCompleteColumn(), *times)
        with self._timed(name), self._bar(name, total, *columns) as (progress, task):
            begun = itertools.count()

            def advance(part: str) -> None:
                self._on_part(part)
                progress.update(task, description=self._prefix + part, completed=next(begun))

            yield advance

    @contextmanager
    def follow(self, name: str) -> Iterator[Callable[[float], None]]:
        """Show a bar for work that reports only its share done; yields a function to call with that share."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        with (
            self._timed(name),
            Progress(
                *columns, TimeElapsedColumn(), console=self.console, transient=True, disable=not self._is_live
            ) as progress,
        ):
            task = progress.add_task(name, total=1.0)

            def on_progress(share: float) -> None:
                progress.update(task, completed=share)

            yield on_progress

    @contextmanager
    def transfer(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar for copying; yields a function to call with (bytes sent, bytes in total)."""
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with self._timed(name), self._bar(name, None, *columns) as (progress, task):

            def on_progress(sent_bytes: int, total_bytes: int) -> None:
                progress.update(task, completed=sent_bytes, total=total_bytes)

            yield on_progress

    @contextmanager
    def _bar(self, name: str, total: int | None, *columns: "ProgressColumn") -> Iterator["tuple[Progress, TaskID]"]:
        """A line in the shared display, or in a new display with these columns."""
        from rich.progress import Progress

        if self._shared is None:
            with Progress(*columns, console=self.console, transient=True, disable=not self._is_live) as progress:
                yield progress, progress.add_task(name, total=total)
        else:
            task = self._shared.add_task(self._prefix + name, total=total)
            try:
                yield self._shared, task
            finally:
                self._shared.remove_task(task)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        with profile.stage(self._prefix + name):
            yield
        self.seconds[name] = time.monotonic() - start
        self.console.print(
            f"[green]✓[/] {escape(self._prefix + name)} [dim]{self.seconds[name]:.1f} s[/]", soft_wrap=True
        )

    def note(self, text: str) -> None:
        """Print one line that belongs to no step."""
        self.console.print(f"[dim]·[/] {escape(self._prefix + text)}", soft_wrap=True)


def start_table(first: str, *others: str) -> "Table":
    """Begin a table: names on the left, numbers on the right, long cells folded and never cut."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table
