# ruff: noqa: T201 - it prints its table
"""A language model of 135 million parameters at fewer of them: perplexity, CPU seconds and peak memory of each way.

    RANKSHIP_SMOLLM2=folder RANKSHIP_DATA=… python benchmarks/studies/smollm2.py --kept 0.9 0.8 0.6 --out smollm2.json

The folder is SmolLM2-135M as transformers saves it, in safetensors. The text is WikiText-2's validation part: samples
are windows of 256 of its tokens, drawn by the seed from all but the end, and the last tokens are scored. Shares are of
the linear layers' weights, the embedding and its tied head not among them. Nothing is trained, and no label is read.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from evaluation_data import find_data
from torch import Tensor, nn

from rankship_pipeline.align.neurons import mark_neurons
from rankship_pipeline.evaluate.calibrate import Grams, collect_halves
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.evaluate.perplexity import measure_perplexity
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import fit_metric
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.layers import Layer, as_matrix, count_parameters, find_layers, get_layer
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.stats import gather_stats
from rankship_pipeline.recipe.choices import RankChoice, RefineChoice
from rankship_pipeline.recover.reconstruct import reconstruct
from rankship_pipeline.recover.refine import refine

WIDTH = 256  # tokens of one sample
SCORED_WIDTH = 512
HELD_OUT = 20_000  # tokens at the end that no sample is drawn from
EXCLUDED = ("*embed_tokens*", "*lm_head*")


@dataclass(frozen=True)
class Way:
    """A way to choose ranks; whether errors are weighed by their effect on the predictions, and layers refitted.

    `refined_s` processor seconds of training block by block follow, without labels.
    """

    name: str
    ranks: RankChoice
    is_curved: bool = True
    is_refitted: bool = False
    refined_s: float = 0.0


WAYS = (
    Way("uniform, whitened", RankChoice(method="uniform", sensitivity="relative", forms=("svd",)), is_curved=False),
    Way("knapsack", RankChoice(sensitivity="gradient", forms=("svd",))),
    Way("knapsack, neurons too", RankChoice(sensitivity="gradient", forms=("svd", "width"))),
    Way("the same, refitted", RankChoice(sensitivity="gradient", forms=("svd", "width")), is_refitted=True),
    Way("neurons too, blocks refined", RankChoice(sensitivity="gradient", forms=("svd", "width")), refined_s=400.0),
)


@contextmanager
def count_seconds(into: dict[str, float], key: str) -> Iterator[None]:
    """Set the CPU seconds of what runs inside under a key."""
    before = time.process_time()
    yield
    into[key] = round(time.process_time() - before, 1)


def load_model(folder: str) -> nn.Module:
    """The model as one of token ids to logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return ByPosition(model, ("input_ids",)).eval()


def load_tokens(folder: str, seed: int, samples: int, scored: int) -> tuple[Tensor, Tensor]:
    """Samples (samples, 256), and the tokens to score with the one before them."""
    from transformers import AutoTokenizer

    text = find_data("wikitext2/valid.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    windows = tokens[: (len(tokens) - HELD_OUT) // WIDTH * WIDTH].view(-1, WIDTH)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    return windows[chosen], tokens[-scored - 1 :]


def take_apart(model: nn.Module, layers: Sequence[Layer], grams: Grams, curvatures: Grams, samples: int) -> Analysis:
    """Every layer decomposed by what the samples showed; without `curvatures` by its inputs alone."""
    metrics = {}
    for layer in layers:
        weight = as_matrix(get_layer(model, layer.name))
        metrics[layer.name] = fit_metric(weight, grams[layer.name], curvatures.get(layer.name), samples)
    return analyse(model, tuple(layers), metrics, "swift")


def collect(
    model: nn.Module, inputs: Tensor, layers: Sequence[Layer], kept: Path | None, seconds: dict[str, float]
) -> tuple[Grams, Grams]:
    """Grams and curvatures on two halves of the samples, from the file `kept` if it is there."""
    if kept is not None and kept.is_file():
        grams, curvatures = torch.load(kept, mmap=True, weights_only=True)
        return grams, curvatures
    with count_seconds(seconds, "grams"):
        grams = collect_halves(collect_grams, model, (inputs,), layers)
    with count_seconds(seconds, "curvatures"):
        curvatures = collect_halves(collect_curvatures, model, (inputs,), layers)
    if kept is not None:
        torch.save((grams, curvatures), kept)
    return grams, curvatures


def main() -> None:
    """Make the table, or say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--ways", nargs="+", default=[way.name for way in WAYS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--scored", type=int, default=12_288)
    parser.add_argument("--step-size", type=float, default=1e-3, help="of refinement")
    parser.add_argument("--moments", type=Path, help="a file that keeps what the samples showed for the next run")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = os.environ.get("RANKSHIP_SMOLLM2", "")
    if not Path(folder, "config.json").is_file():
        print("skipped: RANKSHIP_SMOLLM2 names no folder of SmolLM2-135M")
        return
    model = load_model(folder)
    inputs, text = load_tokens(folder, given.seed, given.samples, given.scored)
    rows: list[dict[str, object]] = []

    def score(one: nn.Module, **named: object) -> None:
        found = measure_perplexity(one, text, length=SCORED_WIDTH, stride=SCORED_WIDTH, batch=4)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        interval = [found.low, found.high]
        rows.append({**named, "perplexity": found.perplexity, "interval": interval, "peak_gib": round(peak, 2)})
        print(json.dumps(rows[-1]), flush=True)

    score(model, way="dense")
    layers = mark_neurons(model, find_layers(model, EXCLUDED), (inputs,))
    seconds: dict[str, float] = {}
    grams, curvatures = collect(model, inputs, layers, given.moments, seconds)
    factored = sum(layer.parameters for layer in layers)
    fixed = count_parameters(model) - factored
    for way in (one for one in WAYS if one.name in given.ways):
        own = dict(seconds)
        with count_seconds(own, "analysis"):
            known = layers if "width" in way.ranks.forms else find_layers(model, EXCLUDED)
            analysis = take_apart(model, known, grams, curvatures if way.is_curved else {}, given.samples)
            stats = gather_stats(analysis, way.ranks, {})
        for kept in given.kept:
            with count_seconds(own, "allocation"):
                plan = allocate(stats, fixed, fixed + int(kept * factored), way.ranks)
            with count_seconds(own, "filling"):
                refit = way.is_refitted
                small = reconstruct(analysis, plan.factors, (inputs,)) if refit else fill(analysis, plan.factors)
            if way.refined_s:
                with count_seconds(own, "refining"):
                    choice = RefineChoice(cpu_seconds=way.refined_s, by="blocks", step_size=given.step_size)
                    small, _ = refine(small, [(model, (inputs,))], choice, given.seed)
            forms = [one.factors.form if one.factors else "dense" for one in plan.layers]
            counts = {form: forms.count(form) for form in dict.fromkeys(forms)}
            score(small, way=way.name, kept=kept, cpu_seconds=dict(own), layers=counts)
    if given.out is not None:
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
