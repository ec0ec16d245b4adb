# ruff: noqa: INP001 - a script, no package
"""LoRA and QLoRA adapters beside our merge on two sentence tasks, after equal steps.

    RANKSHIP_DATA=… RANKSHIP_SPECIALISTS=… python benchmarks/baselines/adapters_beside_ours.py     # needs bitsandbytes

Three ways to serve SST-2 and SNIPS from one MiniLM-L6: right answers, bytes on disk, latency. LoRA: the pretrained
encoder, dense, and an adapter with a head per task (peft, rank 8 on every linear layer). QLoRA: the same over an
encoder whose linear layers are 4-bit (bitsandbytes: NF4 in blocks of 64, scales quantised too). Ours: both specialists
merged (joint), compressed to the bytes that QLoRA takes in all, and refined without labels. Each adapter takes
`--steps` steps of 64 labelled sentences; ours takes as many steps of 64 unlabelled sentences of each task. What ours
has besides is its teachers: specialists that were fine-tuned before, on labels.

QLoRA's base is dequantised once and not at every step: the same numbers in less time. Files hold float32 but for the
4-bit layers. Latency is one sentence of 48 tokens on one thread of onnxruntime, ways in turns; QLoRA's base runs as
onnxruntime's own 4-bit MatMulBnb4.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import onnx
import onnxruntime
import peft
import torch
from onnx import numpy_helper
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from rankship_pipeline.checkpoint import copy_state, load_function
from rankship_pipeline.compress import analyse
from rankship_pipeline.data import Inputs
from rankship_pipeline.evaluate import measure_accuracy
from rankship_pipeline.export.onnx import export_graph
from rankship_pipeline.heads import Headed
from rankship_pipeline.huggingface import LogitsOnly
from rankship_pipeline.likeness import RefineChoice
from rankship_pipeline.preflight import prepare
from rankship_pipeline.progress import Steps
from rankship_pipeline.recipe import Comparison
from rankship_pipeline.recipe_rules import read_recipe
from rankship_pipeline.records import Accuracy
from rankship_pipeline.refine import refine
from rankship_pipeline.stages import Stages
from rankship_pipeline.store import Store

STUDIES = Path(__file__).parents[1] / "studies"
RANK, ALPHA, STEP_SIZE = 8, 16, 1e-3
BATCH = 64  # labelled sentences of a step; refine.BATCH holds as many of each of two tasks
LINEAR = ["query", "key", "value", "dense"]  # every linear layer of a BERT but its head
NAMES = ("input_ids", "attention_mask")
OURS = Comparison(name="ours", merge="joint", ranks="knapsack", whitening="eigen")


@dataclass(frozen=True)
class Way:
    """One way to serve both tasks: what each task runs, its right answers, and the bytes of everything on disk.

    `specialists` are the models that ours was made of, where it was.
    """

    name: str
    modules: Mapping[str, nn.Module]
    accuracies: dict[str, Accuracy]
    size_bytes: int
    cpu_seconds: float
    specialists: dict[str, Accuracy] = field(default_factory=dict)


class OneTask(nn.Module):
    """A backbone and one head, as they run for one task."""

    def __init__(self, joined: Headed, task: int) -> None:
        super().__init__()
        self.backbone, self.head = joined.backbone, joined.heads[str(task)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokens (batch, width) to logits (batch, classes)."""
        logits: Tensor = self.head(self.backbone(input_ids, attention_mask))
        return logits


def quantise(model: nn.Module) -> dict[str, Tensor]:
    """Round the weights of all adapted layers to 4 bits in place; returns what a file holds of them."""
    stored = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in LINEAR:
            packed, state = bitsandbytes.functional.quantize_4bit(
                layer.weight.data, quant_type="nf4", blocksize=64, compress_statistics=True
            )
            stored[f"{name}.weight"] = packed
            for key, value in state.as_dict(packed=True).items():
                stored[f"{name}.weight.{key}"] = value
            layer.weight.data = bitsandbytes.functional.dequantize_4bit(packed, state).to(torch.float32)
    return stored


def train_adapter(module: nn.Module, labelled: tuple[Inputs, Tensor], steps: int, seed: int) -> peft.PeftModel:
    """A LoRA adapter and a head, trained on labels with AdamW on a linear ramp up and down."""
    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    adapted = peft.get_peft_model(module.get_submodule("model"), settings).eval()
    student = LogitsOnly(adapted, NAMES)
    (ids, mask), labels = labelled
    chosen = [one for one in adapted.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=STEP_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, STEP_SIZE, total_steps=steps, pct_start=0.1, anneal_strategy="linear"
    )
    for _ in range(steps):
        rows = torch.randint(len(ids), (BATCH,))
        width = int(mask[rows].sum(1).max())
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(ids[rows, :width], mask[rows, :width])
        loss = functional.cross_entropy(logits.float(), labels[rows])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimiser.step()
        schedule.step()
    return adapted


def make_adapters(name: str, tasks: dict[str, Any], steps: int, folder: Path, *, four_bits: bool) -> Way:
    """One base for all tasks and an adapter with its head for each, written as they would be shipped."""
    begun, modules, accuracies = time.process_time(), {}, {}
    for task, data in tasks.items():
        module = load_function(f"minilm.py:{task}", STUDIES)()
        load_function("minilm.py:take_pretrained", STUDIES)(module, 0)
        stored = quantise(module) if four_bits else {}
        base = {key: value for key, value in copy_state(module).items() if "classifier" not in key}
        kept = {key: value for key, value in base.items() if key not in stored}
        save_file({**kept, **stored}, folder / "base.safetensors")  # the same for every task
        adapted = train_adapter(module, data["labelled"], steps, seed=0)
        adapted.save_pretrained(os.fspath(folder / task), save_embedding_layers=False)
        modules[task] = LogitsOnly(adapted.get_submodule("base_model.model"), NAMES).eval()
    took = time.process_time() - begun
    for task, data in tasks.items():
        accuracies[task] = measure_accuracy(modules[task], *data["tests"], stage=name)
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return Way(name=name, modules=modules, accuracies=accuracies, size_bytes=size, cpu_seconds=took)


def make_ours(name: str, size_bytes: int, steps: int, folder: Path, store: Path) -> Way:
    """The specialists merged, compressed until backbone and heads take `size_bytes`, and refined."""
    prepared = prepare(read_recipe(STUDIES / "minilm-two.toml"), STUDIES)
    stages = Stages(replace(prepared, budget=min(size_bytes // 4, prepared.dense_parameters)), Store(store), Steps())
    begun = time.process_time()
    merged, interference = stages.merge(OURS.merge)
    metrics, _ = stages.choose_metrics(merged, OURS)
    compressed, _ = stages.make_compressed(
        analyse(merged.module, prepared.layers, metrics, OURS.whitening), OURS, interference
    )
    names = [source.name for source in prepared.recipe.models]
    teachers = [
        (stages.load_source(source).module, prepared.data.list_unlabelled(source.name))
        for source in prepared.recipe.models
    ]
    module, _ = refine(compressed, teachers, RefineChoice(steps=steps), seed=0)
    took = time.process_time() - begun
    save_file(copy_state(module), folder / f"{name}.safetensors")
    if not isinstance(module, Headed):
        raise TypeError(type(module))
    return Way(
        name=name,
        modules={task: OneTask(module, number) for number, task in enumerate(names)},
        accuracies={task: measure_accuracy(module, *prepared.data.tests[task], stage=name) for task in names},
        specialists={one.name: stages.evaluate_source(one) for one in prepared.recipe.models},
        size_bytes=(folder / f"{name}.safetensors").stat().st_size,
        cpu_seconds=took,
    )


def export(module: nn.Module, inputs: Inputs, path: Path) -> None:
    """Write the module as ONNX for inputs of this shape."""
    with torch.no_grad():
        export_graph(torch.export.export(module.eval(), inputs), path)


def quantise_graph(path: Path) -> int:
    """Turn the adapted layers' weights of an ONNX file into 4 bits; returns how many there are."""
    model = onnx.load(path)
    _turn_weights(model.graph)
    weights = {one.name: tuple(one.dims) for one in model.graph.initializer}
    small = [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and min(weights.get(node.input[1], (0,))) <= RANK
    ]
    quantiser = MatMulBnb4Quantizer(model, MatMulBnb4Quantizer.NF4, 64, nodes_to_exclude=small)
    quantiser.process()
    quantiser.model.save_model_to_file(str(path))
    return sum(node.op_type == "MatMulBnb4" for node in onnx.load(path).graph.node)


def _turn_weights(graph: onnx.GraphProto) -> None:
    """Put weights that a Transpose turns into the place of its output: the quantiser looks for constants alone."""
    held = {one.name: one for one in graph.initializer}
    for node in [one for one in graph.node if one.op_type == "Transpose" and one.input[0] in held]:
        turned = np.ascontiguousarray(numpy_helper.to_array(held[node.input[0]]).T)
        graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
        graph.initializer.remove(held[node.input[0]])
        graph.node.remove(node)


def time_rounds(files: dict[str, Path], inputs: Inputs, rounds: int, runs: int = 20) -> dict[str, list[float]]:
    """Median milliseconds of one run, per file and round; files take turns, in another order every round."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for name, path in files.items()
    }
    found: dict[str, list[float]] = {name: [] for name in files}
    for number in range(rounds + 1):
        for name in sorted(files, reverse=number % 2 == 1):
            session = sessions[name]
            feeds = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), inputs, strict=True)}
            took = statistics.median(_time(lambda: session.run(None, feeds), runs))  # noqa: B023 - called at once
            if number:  # the first round warms up
                found[name].append(took)
    return found


def _time(run: Callable[[], object], runs: int) -> Iterator[float]:
    for _ in range(runs):
        begun = time.perf_counter()
        run()
        yield 1000 * (time.perf_counter() - begun)


def describe(way: Way, latencies: dict[str, list[float]], files: dict[str, Path]) -> dict[str, Any]:
    """What is kept of one way."""
    values = [100 * one.value for one in way.accuracies.values()]
    return {
        "accuracy_percent": {task: 100 * one.value for task, one in way.accuracies.items()},
        "interval_percent": {task: [100 * one.low, 100 * one.high] for task, one in way.accuracies.items()},
        "mean_percent": statistics.mean(values),
        "specialists_percent": {task: 100 * one.value for task, one in way.specialists.items()},
        "bytes_on_disk": way.size_bytes,
        "cpu_seconds": way.cpu_seconds,
        "latency_ms": {
            task: {"median": statistics.median(times), "least": min(times), "most": max(times)}
            for task, times in latencies.items()
        },
        "onnx_bytes": {task: path.stat().st_size for task, path in files.items()},
    }


def main() -> None:
    """Make the ways, measure them in turns, print and write all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of each adapter; ours takes as many of both tasks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of training; latency is always on one")
    parser.add_argument("--store", type=Path, default=Path("adapters_store"))
    parser.add_argument("--out", type=Path, default=Path("adapters_beside_ours.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    load_before = os.getloadavg()
    tasks = load_function("minilm.py:load_labelled", STUDIES)(("sst2", "snips"))
    rows, kinds = dict[str, Any](), dict[str, int]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place in ("lora", "qlora", "ours"):
            (folder / place).mkdir()
        ways = [
            make_adapters("lora", tasks, given.steps, folder / "lora", four_bits=False),
            make_adapters("qlora", tasks, given.steps, folder / "qlora", four_bits=True),
        ]
        ways.append(make_ours("ours", ways[1].size_bytes, given.steps, folder / "ours", given.store))
        files = {f"{way.name} {task}": folder / f"{way.name}-{task}.onnx" for way in ways for task in tasks}
        for way in ways:
            for task, data in tasks.items():
                sample = tuple(tensor[:1] for tensor in data["tests"][0])
                export(copy.deepcopy(way.modules[task]), sample, files[f"{way.name} {task}"])
                if way.name == "qlora":
                    kinds[task] = quantise_graph(files[f"{way.name} {task}"])
        sample = tuple(tensor[:1] for tensor in tasks["sst2"]["tests"][0])
        times = time_rounds(files, sample, given.rounds)
        for way in ways:
            mine = {task: f"{way.name} {task}" for task in tasks}
            rows[way.name] = describe(
                way, {task: times[key] for task, key in mine.items()}, {task: files[key] for task, key in mine.items()}
            )
    report = {
        "steps": given.steps,
        "batch": BATCH,
        "rank": RANK,
        "ways": rows,
        "four_bit_operators": kinds,
        "conditions": {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": given.threads,
            "load_average_before": load_before,
            "load_average_after": os.getloadavg(),
            **{key: version(key) for key in ("torch", "peft", "bitsandbytes", "onnxruntime", "transformers")},
        },
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    given.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
