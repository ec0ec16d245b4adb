# ruff: noqa: INP001 - a script, no package
"""The overhead of our timing: the agent's median of one inference beside the runtime's own loop's, round by round.

    python benchmarks/baselines/timing_overhead.py RECIPE --out timing_overhead.json

Every round times the recipe's dense and compressed models in fresh processes, one after the other: by the agent, as in
every trial, and by an independent loop. For ONNX that is onnxruntime's C API without Python (`onnxruntime_loop.c`
beside this file, compiled here with gcc against the wheel's own library; it does what onnxruntime's perf_test does,
which no wheel has). For TFLite it is the loop of LiteRT's benchmark tool
(`ai_edge_litert.tools.benchmark_litert_model`), which logs every tenth inference. Every other round runs backwards.
"""

import argparse
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rankship_benchmarks.costs.runtime_on_device import Place, Subject, choose_place
from rankship_benchmarks.judge.validity import keep_valid
from rankship_benchmarks.stats.estimates import Estimate, estimate_median, estimate_ratio
from rankship_pipeline import __version__
from rankship_pipeline.export.artifact import find_proof
from rankship_pipeline.flow.budget import price_recipe
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.store import Store, default_root
from rankship_pipeline.recipe.choices import choose
from rankship_pipeline.recipe.rules import read_recipe
from rankship_targets.devices.device import THIS_MACHINE, find_device
from rankship_targets.session.session import open_session

EFFORT = (500, 300, 500)  # samples and ms at least, ms of warm-up at most
RUNS = 500
TIMED_BY_LITERT = 10  # its tool logs every tenth inference

Rounds = dict[int, float]


@dataclass(frozen=True)
class Case:
    """One artifact, how the agent times it, and the independent loop, which returns a median in ns."""

    name: str
    place: Place
    subject: Subject
    other: Callable[[], float]


def prepare_cases(recipe_path: Path, place: Place, store: Store, steps: Steps, loop: Path | None) -> list[Case]:
    """Verify and push the dense and the compressed model in one format."""
    recipe = replace(read_recipe(recipe_path), compare=())
    prepared = prepare(recipe, recipe_path.resolve().parent)
    stages = Stages(prepared, store, steps)
    compressed, plan = stages.compress(price_recipe(prepared), choose(recipe))
    subjects = {
        "dense": place.push_dense(prepared, store, steps),
        "compressed": place.push_whole(prepared, store, steps, "compressed", compressed, plan),
    }
    return [Case(f"{name} {place.format}", place, one, find_other(one, store, loop)) for name, one in subjects.items()]


def find_other(subject: Subject, store: Store, loop: Path | None) -> Callable[[], float]:
    """Return the runtime's own loop on an artifact."""
    path, inputs, _ = find_proof(subject.artifact, store)
    if loop is None:
        return lambda: time_by_litert(path)
    return lambda: time_natively(loop, path, inputs[0])


def time_natively(loop: Path, model: Path, array: Path) -> float:
    """Return the median of onnxruntime's C API, in a fresh process."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(model), providers=["CPUExecutionProvider"])
    names = [session.get_inputs()[0].name, session.get_outputs()[0].name]
    sample = np.load(array)[:1].astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "input.f32"
        raw.write_bytes(sample.tobytes())
        argv = [loop, model, *names, raw, str(RUNS), str(EFFORT[2]), *map(str, sample.shape)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if not math.isclose(found["first"], float(session.run(None, {names[0]: sample})[0].ravel()[0]), rel_tol=1e-5):
        raise SystemExit(f"{model}: the native loop computes {found['first']}, onnxruntime's Python something else")
    return float(median(found["ns"]))


def time_by_litert(model: Path) -> float:
    """Return the median of LiteRT's own benchmark tool over the inferences that it logs, in a fresh process."""
    argv = [sys.executable, __file__, "--litert", os.fspath(model)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return float(median(json.loads(done.stdout.splitlines()[-1])))


def run_litert(model: str) -> None:
    """Run LiteRT's tool in this process; its log has every tenth inference in ms, unrounded."""
    from ai_edge_litert.tools import benchmark_litert_model as tool

    taken: list[int] = []

    class Listener(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            if entry.msg.startswith("  Run ") and isinstance(entry.args, tuple):
                taken.append(round(float(str(entry.args[2])) * 1e6))

    tool.logger.addHandler(Listener())
    tool.logger.setLevel(logging.DEBUG)
    tool.logger.propagate = False
    sys.argv = ["tool", "--model", model, "--verbose", f"--num_runs={TIMED_BY_LITERT * RUNS}", "--warmup_runs=500"]
    tool.run_benchmark(tool.parse_args())
    sys.stdout.write(json.dumps(taken) + "\n")


def build_loop(folder: Path) -> Path:
    """Compile the native loop against the wheel's library."""
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise SystemExit("onnxruntime is not installed")
    (library,) = (Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*")
    linked = folder / "libonnxruntime.so.1"
    linked.symlink_to(library)
    source = Path(__file__).with_name("onnxruntime_loop.c")
    binary = folder / "onnxruntime_loop"
    argv: list[str | Path] = ["gcc", "-std=gnu11", "-O2", source, "-o", binary, linked, f"-Wl,-rpath,{folder}"]
    subprocess.run(argv, check=True)
    return binary


def time_all(cases: list[Case], rounds: int, steps: Steps) -> Mapping[str, tuple[Rounds, Rounds]]:
    """Return the medians in ns by case: the agent's and the other loop's, by round."""
    found: dict[str, tuple[Rounds, Rounds]] = {case.name: ({}, {}) for case in cases}
    with steps.track("time by both", rounds) as advance:
        for number in range(rounds):
            advance("time by both")
            for case in cases if number % 2 == 0 else cases[::-1]:
                ours, theirs = found[case.name]
                other_first = number % 4 in {1, 2}
                if other_first:
                    theirs[number] = case.other()
                (trial,) = case.place.time([case.subject], number, EFFORT)
                if keep_valid([trial]):
                    ours[number] = median(trial.samples_ns)
                if not other_first:
                    theirs[number] = case.other()
    return found


def describe(ours: Rounds, theirs: Rounds) -> dict[str, Any]:
    """Return both times, their ratio paired by round, and every round's medians."""
    return {
        "agent ns": show(estimate_median(list(ours.values()))),
        "other loop ns": show(estimate_median(list(theirs.values()))),
        "agent to other": show(estimate_ratio(ours, theirs)),
        "medians_ns": {"agent": ours, "other": theirs},
    }


def show(estimate: Estimate | None) -> list[float | None]:
    """Return value, low, high."""
    return [] if estimate is None else [estimate.value, estimate.low, estimate.high]


def main() -> int:
    """Measure and write one JSON file with conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--litert", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.litert:
        run_litert(arguments.litert)
        return 0
    if arguments.recipe is None or arguments.out is None:
        parser.error("a recipe and --out are needed")
    steps, store, begun = Steps(), Store(default_root()), datetime.now(UTC)
    load_before = os.getloadavg()
    formats: tuple[Format, ...] = ("onnx", "tflite")
    with (
        tempfile.TemporaryDirectory() as folder,
        open_session(find_device(THIS_MACHINE), on_news=steps.note) as session,
    ):
        loops = {"onnx": build_loop(Path(folder)), "tflite": None}
        places = [choose_place(session, one, 1) for one in formats]
        cases = [
            case for one in places for case in prepare_cases(arguments.recipe, one, store, steps, loops[one.format])
        ]
        found = time_all(cases, arguments.rounds, steps)
        probe = session.probe()
    known = {
        "conditions": {
            "begun": begun.isoformat(timespec="seconds"),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "load before and after": [round(one, 1) for one in (*load_before, *os.getloadavg())],
            "processor": probe.cpu_model,
            "cores": probe.cpu_count,
            "runtimes": {one.format: one.runtime for one in places},
            "threads": 1,
            "rounds": arguments.rounds,
            "rankship": __version__,
            "python": platform.python_version(),
        },
        "cases": {name: describe(*both) for name, both in found.items()},
    }
    write_atomic(arguments.out, (json.dumps(known, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
