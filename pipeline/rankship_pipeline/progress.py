"""Progress of long work on stderr: a live line on a terminal, one line per finished step elsewhere."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.markup import escape


class Steps:
    """Names each step while it runs and its wall time when it is done; keeps the times for the record."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show `name` as running, then as done."""
        with self._timed(name), self.console.status(escape(name)):
            yield

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """A bar over `total` parts; call what it gives with each part's name as the part begins."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        name_column = TextColumn("{task.description}", markup=False)
        times = (TimeElapsedColumn(), TextColumn("still"), TimeRemainingColumn())
        columns = (name_column, BarColumn(), MofNCompleteColumn(), *times)
        with self._timed(name), Progress(*columns, console=self.console, transient=True) as progress:
            task, begun = progress.add_task(name, total=total), itertools.count()

            def advance(part: str) -> None:
                progress.update(task, description=part, completed=next(begun))

            yield advance

    @contextmanager
    def transfer(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A step with a bar for each copy of which it hears (bytes so far, bytes in all)."""
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with self._timed(name), Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=None)

            def tell(sent_bytes: int, total_bytes: int) -> None:
                progress.update(task, completed=sent_bytes, total=total_bytes)

            yield tell

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        self.console.print(f"[green]✓[/] {escape(name)} [dim]{self.seconds[name]:.1f} s[/]", soft_wrap=True)

    def note(self, text: str) -> None:
        """One line that belongs to no step."""
        self.console.print(f"[dim]·[/] {escape(text)}", soft_wrap=True)
