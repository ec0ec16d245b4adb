"""What Dask leaves as a connection ends: sockets for the garbage collector, each of which warns in a later test."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def collecting() -> Iterator[None]:
    """Collect what the block leaves while nobody is warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(autouse=True)
def collect_after_dask() -> Iterator[None]:
    """Do so around each test of a module that imports this fixture."""
    with collecting():
        yield
