"""Reads other memory between inferences, so that a part of a model finds the caches as the rest of it leaves them."""

from __future__ import annotations

from .runtimes import Loaded
from .system import read_each

CACHES = "/sys/devices/system/cpu/cpu[0-9]*/cache/index[0-9]*/size"  # each as "32768K"
TIMES = 2  # of the largest cache: reading more changes nothing
MOST = 1 << 26  # bytes, where the device does not tell the sizes of its caches
ABSENT, PRESENT = b"\0", b"\1"


def find_cache_bytes() -> int | None:
    """Return the size of the largest cache; None if the device does not tell."""
    sizes = [text[:-1] for text in read_each(CACHES) if text[-1:] == "K" and text[:-1].isdigit()]
    return max((int(size) * 1024 for size in sizes), default=None)


def read_beside(model: Loaded, count: int) -> Loaded:
    """Return the model with `count` bytes of other memory read before each inference, outside of its time.

    No more are read than replace all that caches hold. 0: the model as it is.
    """
    cache = find_cache_bytes()
    count = min(count, MOST if cache is None else TIMES * cache)
    if count <= 0:
        return model
    other, make_ready = bytearray(PRESENT) * count, model.make_ready

    def make_cold(feed: object) -> None:
        other.find(ABSENT)  # at the speed of memory; it is not there, so all of it is read
        make_ready(feed)

    return model._replace(make_ready=make_cold)
