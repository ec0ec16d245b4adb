"""Pauses Python's garbage collector while exporters work."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_collector() -> Iterator[None]:
    """Collect no cycles in the body; afterwards the collector is as it was.

    Tracing makes millions of small objects, among which the collector searches again and again, through all that torch
    and the converters imported, and JAX adds a search of its own to each: a seventh of an export's time. What lives on
    meanwhile is graphs, not weights, and is freed at the next collection.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
