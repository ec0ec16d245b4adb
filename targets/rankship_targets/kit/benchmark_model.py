"""LiteRT's own `benchmark_model`, supplied by the user, for delegates that no package offers: GPU and NNAPI.

It prints a summary and no samples, so its figures become an Aggregate and no Trial. The format of
its output is taken from its sources and published logs; this code was never tried on a phone.
"""

import re
from collections.abc import Sequence

from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.errors import CommandFailed, Lacks
from rankship_targets.transport.protocol import NOT_EXECUTABLE, NOT_FOUND, Transport, explain_failure
from rankship_targets.trials.aggregate import BenchmarkSummary, Share

FLAGS: dict[Delegate, tuple[str, ...]] = {
    "cpu": ("--use_xnnpack=true",),
    "gpu": ("--use_gpu=true",),
    "nnapi": ("--use_nnapi=true",),
}
_LOG_PREFIX = re.compile(r"^(?:(?:INFO|VERBOSE|WARNING|ERROR): |[IWEV]\s+tflite\s*: )?")
_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_PAIR = re.compile(rf"\b(count|first|curr|min|max|avg|std|p5|median|p95)={_NUMBER}(?=[\s(]|$)")
_INIT = re.compile(rf"^Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}, ")
_APPLIED = re.compile(
    r"^Explicitly applied (\w+) delegate, and the model graph will be (completely|partially) executed"
)
_NOT_APPLIED = re.compile(r"^Though (\w+) delegate is explicitly applied, the model graph will not be executed")
_ABSURD = 1e15  # microseconds: thirty years
_LEAST_RUNS = 2  # the warm-up and the measurement each print a line of figures


def run_benchmark(
    transport: Transport, binary: str, model: str, delegate: Delegate, *, threads: int, runs: int, timeout_s: float
) -> BenchmarkSummary:
    """Run the program on a model; both paths are on the device."""
    argv = [binary, f"--graph={model}", f"--num_threads={threads}", f"--num_runs={runs}", *FLAGS[delegate]]
    done = transport.run(argv, timeout_s=timeout_s)
    if done.code in {NOT_EXECUTABLE, NOT_FOUND}:
        message = f"{binary} cannot be started: {done.stderr.strip()}"
        hint = "copy LiteRT's benchmark_model for the device's ABI there and make it executable (chmod +x)"
        raise Lacks(message, hint=hint)
    if done.code != 0:
        raise explain_failure(argv, done.code, done.stderr or done.stdout)
    return parse_output((done.stdout + "\n" + done.stderr).splitlines())  # the platform decides which of the two


def parse_output(lines: Sequence[str]) -> BenchmarkSummary:
    """Find the summary in everything that the program printed; CommandFailed if there is none."""
    runs: list[dict[str, float]] = []
    delegated: dict[str, Share] = {}
    init = None
    for line in lines:
        text = _LOG_PREFIX.sub("", line.strip(), count=1)
        if text.startswith("count="):
            pairs = [(name, float(value)) for name, value in _PAIR.findall(text)]
            runs.append({name: value for name, value in pairs if value < _ABSURD})
        elif (found := _INIT.match(text)) and max(float(found[1]), float(found[2])) < _ABSURD:
            init = (float(found[1]), float(found[2]))
        elif found := _APPLIED.match(text):
            delegated[found[1]] = "completely" if found[2] == "completely" else "partially"
        elif found := _NOT_APPLIED.match(text):
            delegated[found[1]] = "not"
    if init is None or len(runs) < _LEAST_RUNS or not runs[-1].get("count") or "curr" not in runs[-1]:
        said = " / ".join(line.strip() for line in lines[-3:])[-300:]
        message = f"benchmark_model ended without its summary; its last lines: {said or '(none)'}"
        raise CommandFailed(message, hint="run it by hand on the device and check that it loads the model")
    last, only = runs[-1], runs[-1]["curr"]  # if all are equal, it prints only this one
    return BenchmarkSummary(
        count=int(last["count"]),
        mean_ns=_to_ns(last.get("avg", only)),
        min_ns=_to_ns(last.get("min", only)),
        max_ns=_to_ns(last.get("max", only)),
        std_ns=_to_ns(last["std"]) if "std" in last else None,
        median_ns=_to_ns(last["median"]) if "median" in last else None,
        init_ns=_to_ns(init[0]),
        first_ns=_to_ns(init[1]),
        delegated=delegated,
    )


def _to_ns(microseconds: float) -> int:
    return round(microseconds * 1000)
