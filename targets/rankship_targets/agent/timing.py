"""The commands `load`, `infer` and `measure`: all load by the same code, so what was verified is what is measured."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from .beside import read_beside
from .programs import find_program, infer_with, load_with, measure_with
from .protocol import Event, Fault, Request
from .runtimes import Arrays, Loaded, Loader, Model, load_artifact, open_runtime
from .state import read_state
from .system import OWN_STATUS, read_kilobytes, read_waited
from .tokens import open_tokens

WINDOW_SAMPLES, WINDOW_NS = 3, 20_000_000  # a window of the warm-up ends when both are reached
# The warm-up is steady by its last windows' medians: how many, largest / smallest, first / last if they fall.
STEADY_WINDOWS, STEADY_SPREAD, STEADY_TREND = 3, 1.05, 1.02


def load(request: Request) -> Iterator[Event]:
    """Load the artifact and report the time it took and the memory resident then, without an inference."""
    program = find_program(request["format"])
    if program is not None:
        yield from load_with(program, request)
        return
    loader, reading = open_runtime(request["format"], request.get("delegate"))
    yield {"event": "opened", "runtime": reading, "rss_bytes": read_kilobytes(OWN_STATUS, "VmRSS")}
    _, loaded = load_timed(loader, request)
    yield loaded
    yield {"event": "done"}


def infer(request: Request) -> Iterator[Event]:
    """Run every sample once, `rows` at a time, and save the outputs, stacked on axis 0, in one .npy file per output."""
    program = find_program(request["format"])
    if program is not None:
        yield from infer_with(program, request)
        return
    loader, reading = open_model(request)
    yield {"event": "opened", "runtime": reading, "rss_bytes": read_kilobytes(OWN_STATUS, "VmRSS")}
    model = load_artifact(loader, request)
    import numpy as np

    rows = [
        [np.array(output) for output in model.unpack(model.infer(model.prepare(sample)))]
        for sample in load_samples(request["inputs"], request.get("rows") or 1)
    ]
    for position, outputs in enumerate(zip(*rows)):  # noqa: B905 - as above
        np.save(f"{request['output']}.{position}.npy", np.concatenate(outputs), allow_pickle=False)
    yield {"event": "done", "outputs": len(rows[0])}


def measure(request: Request) -> Iterator[Event]:
    """Time single inferences of the first sample and report every time."""
    program = find_program(request["format"])
    if program is not None:
        yield from measure_with(program, request)
        return
    yield {"event": "state", "when": "before", "state": read_state()}
    loader, reading = open_model(request)
    yield {"event": "opened", "runtime": reading, "rss_bytes": read_kilobytes(OWN_STATUS, "VmRSS")}
    model, loaded = load_timed(loader, request)
    yield loaded
    model = read_beside(model, request.get("beside_bytes") or 0)
    feed = model.prepare(next(load_samples(request["inputs"])))
    gc.collect()
    gc.disable()
    warmup, steady = warm_up(model, feed, request["max_warmup_ms"] * 1_000_000)
    peak = read_kilobytes(OWN_STATUS, "VmHWM")  # more work in between would cool the caches
    waited = read_waited()
    start_ns = time.monotonic_ns()  # the clock that meters are read by
    taken = time_inferences(model, feed, request["min_samples"], request["min_duration_ms"] * 1_000_000)
    end_ns = time.monotonic_ns()
    waited_after = read_waited()
    waited_ns = None if waited is None or waited_after is None else waited_after - waited
    yield {"event": "state", "when": "after", "state": read_state()}
    yield {"event": "warmed", "ns": warmup, "steady": steady, "peak_rss_bytes": peak}
    yield {"event": "samples", "ns": taken, "start_ns": start_ns, "end_ns": end_ns, "waited_ns": waited_ns}
    yield {"event": "done"}


def open_model(request: Request) -> tuple[Loader, Event]:
    """Import the format's runtime; the loader is a decoder's where the request says how the file generates."""
    loader, reading = open_runtime(request["format"], request.get("delegate"))
    return open_tokens(request) if request.get("generation") else loader, reading


def load_timed(loader: Callable[[str, int], Model], request: Request) -> tuple[Model, Event]:
    """Load the artifact; also returns the event with the time it took and the memory resident then."""
    started = time.perf_counter_ns()
    model = load_artifact(loader, request)
    load_ns = time.perf_counter_ns() - started
    return model, {"event": "loaded", "load_ns": load_ns, "rss_bytes": read_kilobytes(OWN_STATUS, "VmRSS")}


def load_samples(paths: list[str], rows: int = 1) -> Iterator[Arrays]:
    """Yield `rows` samples of every input after the others, batch dimension first; all must have as many samples."""
    import numpy as np

    try:
        arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        (count,) = {len(array) for array in arrays} - {0}
    except Exception as failure:
        raise Fault("bad_input", f"{paths} must be .npy files with the same number of samples: {failure}") from failure
    for row in range(0, count, rows):
        yield [array[row : row + rows].copy() for array in arrays]


def time_inferences(model: Loaded, feed: Any, min_samples: int, min_duration_ns: int) -> list[int]:  # noqa: ANN401
    """Time single inferences until there are enough of them and enough time has passed."""
    clock, run, make_ready, taken = time.perf_counter_ns, model.infer, model.make_ready, []
    end = clock() + min_duration_ns
    while True:
        make_ready(feed)
        before = clock()
        run(feed)
        after = clock()
        taken.append(after - before)
        if after >= end and len(taken) >= min_samples:
            return taken


def warm_up(model: Loaded, feed: Any, budget_ns: int) -> tuple[list[int], bool]:  # noqa: ANN401
    """Run until the time per inference is steady or the budget is spent; returns the times, and whether steady."""
    taken, medians, end = list[int](), list[float](), time.perf_counter_ns() + budget_ns
    while True:
        window = time_inferences(model, feed, WINDOW_SAMPLES, WINDOW_NS)
        taken += window
        medians.append(statistics.median(window))
        if is_steady(medians) or time.perf_counter_ns() >= end:
            return taken, is_steady(medians)


def is_steady(medians: list[float]) -> bool:
    """Return whether the last three windows' medians are close together and not still falling."""
    last = medians[-STEADY_WINDOWS:]
    falling = last == sorted(last, reverse=True) and last[0] > last[-1] * STEADY_TREND
    return len(last) == STEADY_WINDOWS and max(last) <= min(last) * STEADY_SPREAD and not falling
