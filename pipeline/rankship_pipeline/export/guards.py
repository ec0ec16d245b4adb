"""Watches what torch.export decides about lengths while it traces, to name the line of code that fixes one."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_LOGGER = "torch.fx.experimental.symbolic_shapes"
_ADDED, _EQUAL = "[guard added]", "eval Eq("
_TORCH = Path(torch.__file__).parent


@dataclass
class Guards:
    """The line of code at which torch decided on a length: the first equality, else the first decision; or nothing."""

    place: str = ""
    equality: bool = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the place of a decision; only warnings are shown, as without this filter."""
        message = record.getMessage() if record.levelno == logging.INFO else ""
        equality = _EQUAL in message
        if _ADDED in message and (not self.place or (equality and not self.equality)):
            self.place, self.equality = _find_place(), equality
        return record.levelno > logging.INFO


def _find_place() -> str:
    """The innermost line outside of torch, its file's name and its text."""
    ours = Path(__file__).parent
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if not file.is_relative_to(_TORCH) and file.parent != ours and file.is_file() and file.name != "__init__.py":
            return f"{file.name}:{frame.lineno} ({frame.line})"
    return ""


@contextmanager
def watch_guards() -> Iterator[Guards]:
    """Collect the decisions of a trace in the body, by torch's own messages about them."""
    guards, logger = Guards(), logging.getLogger(_LOGGER)
    level = logger.level
    logger.addFilter(guards)
    logger.setLevel(logging.INFO)
    try:
        yield guards
    finally:
        logger.setLevel(level)
        logger.removeFilter(guards)
