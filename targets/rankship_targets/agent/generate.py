"""The command `generate`: the likeliest token after a prompt, then after that one, and so on, each with its time."""

from __future__ import annotations

import time
from collections.abc import Iterator

from .decoders import Decoder, open_decoder
from .limits import read_limits
from .programs import find_program, generate_with
from .protocol import Event, Request
from .runtimes import open_runtime
from .system import OWN_STATUS, read_kilobytes
from .timing import load_samples, load_timed
from .tokens import fit_limits, take_tokens


def generate(request: Request) -> Iterator[Event]:
    """Generate `new_tokens` tokens, fewer where one of `ends` comes, as the last, or where the context is full."""
    limits, program = read_limits(request), find_program(request["format"])
    if program is not None:
        yield from generate_with(program, request)
        return
    _, reading = open_runtime(request["format"])
    yield {"event": "opened", "runtime": reading, "rss_bytes": read_kilobytes(OWN_STATUS, "VmRSS")}

    def load(path: str, threads: int) -> Decoder:
        return open_decoder(request["format"], path, threads, request.get("delegate"))

    decoder, loaded = load_timed(load, request)
    yield loaded
    limits = fit_limits(limits, decoder)
    given = take_tokens(next(load_samples(request["inputs"])), limits._replace(prompt=1))
    import numpy as np

    left = min(request["new_tokens"], limits.context - len(given) + 1)  # the last one is not given back
    tokens, taken = list[int](), list[int]()
    decoder.rewind(0)
    for _ in range(left):
        before = time.perf_counter_ns()
        tokens.append(int(np.argmax(decoder.step(given))))
        taken.append(time.perf_counter_ns() - before)
        if tokens[-1] in request["ends"]:
            break
        given = np.array(tokens[-1:], np.int64)
    peak = read_kilobytes(OWN_STATUS, "VmHWM")
    yield {"event": "generated", "tokens": tokens, "first_ns": taken[0], "ns": taken[1:], "peak_rss_bytes": peak}
    yield {"event": "done"}
