"""Progress of long work on stderr: a live line on a terminal or in a notebook, one line per finished step elsewhere."""

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID


class Steps:
    """Names each step while it runs and its wall time when it is done; keeps the times for the record."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.seconds: dict[str, float] = {}
        self._shared: Progress | None = None
        self._prefix = ""
        # in a notebook lines move by widgets; without them each step is one line, when it is done
        self._moves = not self.console.is_jupyter or importlib.util.find_spec("ipywidgets") is not None

    @contextmanager
    def side_by_side(self) -> Iterator[Callable[[str], "Steps"]]:
        """Show several workers at once, each on lines of its own: gives what makes the steps of the one so named."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self._moves) as progress:

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
            with self._timed(name), self.console.status(escape(name)) if self._moves else nullcontext():
                yield

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """A bar over `total` parts; call what it gives with each part's name as the part begins."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        name_column = TextColumn("{task.description}", markup=False)
        times = (TimeElapsedColumn(), TextColumn("still"), TimeRemainingColumn())
        columns = (name_column, BarColumn(), MofNCompleteColumn(), *times)
        with self._timed(name), self._bar(name, total, *columns) as (progress, task):
            begun = itertools.count()

            def advance(part: str) -> None:
                progress.update(task, description=self._prefix + part, completed=next(begun))

            yield advance

    @contextmanager
    def follow(self, name: str) -> Iterator[Callable[[float], None]]:
        """A bar for work of which only the share that is done is known; call what it gives with that share."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        with (
            self._timed(name),
            Progress(
                *columns, TimeElapsedColumn(), console=self.console, transient=True, disable=not self._moves
            ) as progress,
        ):
            task = progress.add_task(name, total=1.0)

            def on_progress(share: float) -> None:
                progress.update(task, completed=share)

            yield on_progress

    @contextmanager
    def transfer(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A step with a bar for each copy of which it hears (bytes so far, bytes in all)."""
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with self._timed(name), self._bar(name, None, *columns) as (progress, task):

            def on_progress(sent_bytes: int, total_bytes: int) -> None:
                progress.update(task, completed=sent_bytes, total=total_bytes)

            yield on_progress

    @contextmanager
    def _bar(self, name: str, total: int | None, *columns: "ProgressColumn") -> Iterator["tuple[Progress, TaskID]"]:
        """A line in the display that is shared, or in one of its own with these columns."""
        from rich.progress import Progress

        if self._shared is None:
            with Progress(*columns, console=self.console, transient=True, disable=not self._moves) as progress:
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
        yield
        self.seconds[name] = time.monotonic() - start
        self.console.print(
            f"[green]✓[/] {escape(self._prefix + name)} [dim]{self.seconds[name]:.1f} s[/]", soft_wrap=True
        )

    def note(self, text: str) -> None:
        """One line that belongs to no step."""
        self.console.print(f"[dim]·[/] {escape(self._prefix + text)}", soft_wrap=True)


def start_table(first: str, *others: str) -> "Table":
    """Begin a table: names on the left, numbers on the right, nothing ever cut."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table
