# ruff: noqa: INP001 - a script, no package
"""Seven real nightlies on this machine and an emulated Pi: a throttled night, then a model that becomes slower.

    rankship devices add pi4 --twin pi4; rankship kit build pi4; rankship kit install pi4
    python benchmarks/baselines/week_of_nights.py --to FOLDER --out benchmarks/baselines/week_of_nights.json

Each night is `rankship nightly` itself, once for each device, into one results folder: a small network, made on the
spot, is built, verified and measured; on this machine in rounds with the canary, on the stand-in, where a process
takes seconds to start, in a few rounds without it. The nights follow each other at once, so they differ less than real
nights; their time stamps show it. On the third the stand-in reports throttling; from the sixth on the model's code has
one more operator, a 5×5 average. At the end onnxruntime alone, without Rankship, measures how much slower that is, with
the four files in turn.

No verdict uses rounds before which the load exceeded the cores. On a shared machine, a local device of the inventory
can hide its load, like a device whose kernel reports none, with this `python`:

    #!/bin/sh
    exec unshare --mount sh -c 'mount --bind /dev/null /proc/loadavg && exec .venv/bin/python "$@"' sh "$@"

The figures then record it (`load_told`), and how busy the machine was. Since these figures were measured, a trial with
one thread also reports how long it waited for a processor, which this does not hide: on such a busy machine, its rounds
would be doubted today.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rankship_benchmarks.bundle.bundle import Bundle, open_bundle
from rankship_benchmarks.index.index import refresh_own_index
from rankship_benchmarks.measure.one_device import plan_rounds
from rankship_benchmarks.nightly.histories import Case, list_histories
from rankship_benchmarks.nightly.page import write_page
from rankship_benchmarks.nightly.records import CaseVerdict, NightRecord, list_nights
from rankship_benchmarks.stats.estimates import estimate_median, estimate_ratio, relative_spread
from rankship_benchmarks.stats.steps import Night, find_steps
from rankship_pipeline.cli import main as rankship
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.store import default_root
from rankship_targets.devices.device import THIS_MACHINE, Device, find_device
from rankship_targets.twin.board import THROTTLED
from rankship_targets.twin.pi import overlay_folder, start_pi

if TYPE_CHECKING:
    import numpy as np
    from onnxruntime import InferenceSession

NIGHTS, THROTTLED_NIGHT, SLOWER_NIGHT = 7, 3, 6
THROTTLED_NOW = "4"  # bit 2 of the firmware's flags
NOTE = "seven nights, run one after another without a pause"
WARM_UPS, SAMPLES = 100, 500  # of each file in each round, when the operator's price is measured

MODEL = """
import torch
from torch import nn
from torch.nn import functional


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        widths = (1, 32, 64, 64, 64)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, 1 + (a == 32), 1) for a, b in zip(widths, widths[1:]))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        for layer in self.layers:
            x = functional.relu(layer(x))
        {extra}
        return self.head(x.mean((2, 3)))


def make():
    return Net()


def train(model, seed):
    pass


def load():
    x = torch.randn(96, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    return {{"calibration": {{"net": x[:64]}}, "test_inputs": x[64:], "test_labels": torch.arange(32) % 10}}
"""
RECIPE = """
name = "week"

[[models]]
name = "net"
factory = "model.py:make"
train = "model.py:train"

[data]
loader = "model.py:load"

[budget]
kept_parameters = 0.75

[ranks]
step = 4

[export]
formats = ["onnx"]
"""
SUITE = """
recipe = "week.toml"
rounds = {rounds}
canary = {canary}
min_samples = 20
min_duration_ms = 200
max_warmup_ms = 400
"""


def write_night(folder: Path, arguments: argparse.Namespace, *, slower: bool) -> None:
    """Write a night's inputs: the model's code, the recipe, and a suite for each device."""
    extra = "x = functional.avg_pool2d(x, 5, 1, 2)" if slower else ""
    here = SUITE.format(rounds=arguments.rounds, canary="true")
    emulated = SUITE.format(rounds=arguments.emulated_rounds, canary="false")
    texts = {"model.py": MODEL.format(extra=extra), "week.toml": RECIPE, "here.toml": here, "emulated.toml": emulated}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def live_through(number: int, pi: Device, arguments: argparse.Namespace) -> dict[str, object]:
    """Run one night on both devices; returns its conditions and its verdicts."""
    write_night(arguments.to / "recipe", arguments, slower=number >= SLOWER_NIGHT)
    start_pi(pi)  # it stays on until this process ends
    flags = THROTTLED_NOW if number == THROTTLED_NIGHT else "0"
    (overlay_folder(pi) / THROTTLED).write_text(f"{flags}\n", encoding="ascii")
    told = {
        pi.name: measure(arguments.to / "recipe/emulated.toml", pi.name, arguments),
        arguments.here: measure(arguments.to / "recipe/here.toml", arguments.here, arguments),
    }
    return {"night": number, "devices": told}


def measure(suite: Path, device: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Run one nightly on one device; returns its verdicts, and how busy the machine was."""
    results, before = arguments.to / "results", tell_load()
    words = ["--on", device, "--results", str(results), "--store", str(arguments.store)]
    words += ["--inventory", str(arguments.inventory)] if arguments.inventory else []
    status = rankship(["nightly", str(suite), *words])
    night = list_nights(results)[-1]
    (one,) = night.devices
    return {
        "began_utc": night.started_utc,
        "ended_utc": night.finished_utc,
        "exit": status,
        "gap": one.gap,
        "cases": {case.key.heading: describe_case(case) for case in one.cases},
        "machine": {"before": before, "after": tell_load()},
    }


def tell_load() -> dict[str, str]:
    """Return how busy this machine is: the kernel's load and its pressure, the share of time that programs waited."""
    load, pressure = (Path(name).read_text(encoding="ascii") for name in ("/proc/loadavg", "/proc/pressure/cpu"))
    return {"load_1m": load.partition(" ")[0], "cpu_pressure": pressure.splitlines()[0]}


def describe_case(case: CaseVerdict) -> dict[str, object]:
    """Describe the nightly's verdict on a case."""
    ratio = case.ratio
    interval = [ratio.low, ratio.high] if ratio else None
    return {
        "word": case.verdict,
        "step": case.step,
        "why": case.reason,
        "ratio": ratio and ratio.value,
        "interval": interval,
    }


def describe_history(nights: Sequence[Night]) -> dict[str, object]:
    """Describe a case's level and spread night by night, and the lasting steps that the nightly finds in it."""
    return {"nights": [describe_level(night) for night in nights], "steps": [asdict(one) for one in find_steps(nights)]}


def describe_level(night: Night) -> dict[str, object]:
    """Return one night's median, its interval and its rounds' spread (interquartile range over median)."""
    if not night.rounds_ns:
        return {"gap": night.gap}
    level = estimate_median(night.rounds_ns)
    spread = {"rounds": relative_spread(night.rounds_ns)}
    if night.canary_ns:
        spread["canary"] = relative_spread(night.canary_ns)
    return {"median_ns": level.value, "interval_ns": [level.low, level.high], "of": level.rounds, "spread": spread}


def price_operator(before: Bundle, after: Bundle, store: Path, rounds: int) -> dict[str, object]:
    """Time both nights' files in turn by onnxruntime alone, a fresh session each; returns ratios after/before."""
    import numpy as np

    files = [(when, one) for when, bundle in enumerate((before, after)) for one in bundle.header.build.artifacts]
    sample = np.load(store / Path(files[0][1].file).with_name("input.0.npy"))[:1]
    medians: dict[tuple[int, str], dict[int, float]] = {(when, one.key.variant): {} for when, one in files}
    for number, artifact in plan_rounds([one for _, one in files], rounds):
        when = next(when for when, one in files if one is artifact)
        medians[when, artifact.key.variant][number] = time_file(store / artifact.file, sample)
    return {
        variant: {"median_ns": [median(medians[when, variant].values()) for when in (0, 1)], "ratio": asdict(ratio)}
        for variant in ("dense", "compressed")
        if (ratio := estimate_ratio(medians[1, variant], medians[0, variant]))
    }


def time_file(path: Path, sample: "np.ndarray") -> float:
    """Time a file in a new session of one thread; returns the median inference in ns."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session: InferenceSession = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given: Mapping[str, np.ndarray] = {session.get_inputs()[0].name: sample}
    for _ in range(WARM_UPS):
        session.run(None, given)
    times = []
    for _ in range(SAMPLES):
        began = time.perf_counter_ns()
        session.run(None, given)
        times.append(time.perf_counter_ns() - began)
    return float(median(times))


def find_runs(nights: Sequence[NightRecord], device: str, results: Path) -> tuple[Bundle, Bundle]:
    """Open a device's first run and its last: before and after the model became slower."""
    runs = [one.run for night in nights for one in night.devices if one.device == device and one.run is not None]
    return open_bundle(results / runs[0]), open_bundle(results / runs[-1])


def main() -> None:
    """Run the week, time the added operator, and write the figures and the page."""
    parser = argparse.ArgumentParser(description="Run a week of nightlies on this machine and an emulated Pi.")
    parser.add_argument("--to", type=Path, required=True, help="an empty folder for the recipe and the results")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go (JSON)")
    parser.add_argument("--here", default=THIS_MACHINE, help="this machine in the inventory (default: %(default)s)")
    parser.add_argument("--pi", default="pi4", help="the emulated Pi in the inventory (default: %(default)s)")
    parser.add_argument("--inventory", type=Path, default=None, help="default: the user's own")
    parser.add_argument("--store", type=Path, default=default_root(), help="default: the user's own")
    parser.add_argument("--rounds", type=int, default=16, help="a night, on this machine (default: %(default)s)")
    parser.add_argument("--emulated-rounds", type=int, default=6, help="a night, on the Pi (default: %(default)s)")
    parser.add_argument("--note", default="", help="what else is to be known of this run; kept with the figures")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True)
    pi, began = find_device(arguments.pi, arguments.inventory), time.monotonic()
    told = [live_through(number, pi, arguments) for number in range(1, NIGHTS + 1)]
    results = arguments.to / "results"
    nights = list_nights(results)
    histories: Mapping[Case, Sequence[Night]] = list_histories(refresh_own_index(results), nights)
    write_page(results, nights[-1], nights, histories, note=NOTE)
    runs = find_runs(nights, arguments.here, results)
    report = {
        "what": NOTE,
        "note": arguments.note,
        "cores": os.cpu_count(),
        "conditions": runs[0].header.conditions,
        "load_told": any(one.before.load_1m_milli is not None for run in runs for one in run.trials),
        "rounds_a_night": {arguments.here: arguments.rounds, pi.name: arguments.emulated_rounds},
        "injected": {
            "from_night": SLOWER_NIGHT,
            "after_over_before": price_operator(*runs, arguments.store, arguments.rounds),
        },
        "throttled": {"device": pi.name, "night": THROTTLED_NIGHT},
        "seconds": round(time.monotonic() - began),
        "nights": told,
        "histories": {
            f"{case.device} {case.key.heading}": describe_history(history) for case, history in histories.items()
        },
    }
    write_atomic(arguments.out, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main()
