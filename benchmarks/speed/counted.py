"""The smallest cases, each run once under callgrind with only the job itself counted; started by instructions.py."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from rankship_pipeline.ranks.knapsack import solve
from rankship_pipeline.recipe.choices import RankChoice
from speed.allocation import make_menus
from speed.nets import Shape, make_inputs, make_net
from speed.ours import calibrate, decompose_and_plan, list_layers

CONTROL = "callgrind_control"
_NETS = {
    "resnet": Shape("resnet", 4, (1, 1), side=32),
    "bert": Shape("bert", 32, (1,), tokens=8, words=64),
}
_SAMPLES, _KEPT, _STEP = 2, 0.7, 2

Job = Callable[[], object]


def prepare_calibration(kind: str) -> Job:
    """Return the job of measuring Grams and curvature of a tiny net."""
    model, inputs = make_net(_NETS[kind]), make_inputs(_NETS[kind], _SAMPLES)
    return partial(calibrate, model, inputs, list_layers(model))


def prepare_compression(kind: str) -> Job:
    """Return the job from statistics to a plan of a tiny net."""
    model, inputs = make_net(_NETS[kind]), make_inputs(_NETS[kind], _SAMPLES)
    statistics = calibrate(model, inputs, list_layers(model))
    return partial(decompose_and_plan, model, inputs, statistics, _KEPT, RankChoice(step=_STEP))


def prepare_allocation() -> Job:
    """Return the job of an exact allocation."""
    menus = make_menus(12, 16)
    return partial(solve, menus, int(0.4 * sum(menu[-1].cost for menu in menus)))


JOBS: dict[str, Callable[[], Job]] = {
    "calibrate-resnet": partial(prepare_calibration, "resnet"),
    "calibrate-bert": partial(prepare_calibration, "bert"),
    "compress-resnet": partial(prepare_compression, "resnet"),
    "compress-bert": partial(prepare_compression, "bert"),
    "allocation": prepare_allocation,
}


def count(name: str, times: int) -> None:
    """Run a job that has run once before, so many times, with each run's count in a dump of its own."""
    job = JOBS[name]()
    job()
    for _ in range(times):
        _control("--instr=on")
        torch._C._valgrind_toggle()  # noqa: SLF001 - torch's own benchmarks do so
        job()
        torch._C._valgrind_toggle()  # noqa: SLF001
        _control("--dump", name)
        _control("--instr=off")


def _control(*arguments: str) -> None:
    """Give callgrind an order about this process, which goes on computing, so that it hears it without a debugger."""
    process = subprocess.Popen([CONTROL, *arguments, str(os.getpid())], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        pass
    if process.returncode != 0:
        message = f"{CONTROL} {arguments[0]} ended with status {process.returncode}"
        raise RuntimeError(message)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in sys.argv[2:] or JOBS:
        count(one, int(sys.argv[1]))
