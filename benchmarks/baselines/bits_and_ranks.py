# ruff: noqa: INP001 - a script, no package
"""Ranks and types of weights chosen together on a trained CIFAR-10 ResNet-20, by simulation in torch.

Without labels or training: accuracy over the bytes of all parameters, at several sizes, for dense layers of rounded
weights, ranks at 8 bits, and both together. Types are those of weights; activations stay float32. With "int4" the
convolutions have one scale for each row, which no runtime runs: what the choice would give there.

    RANKSHIP_DATA=… python benchmarks/baselines/bits_and_ranks.py --seeds 0 1 2 --to bits_and_ranks.json
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from cifar import load_resnet20, resnet20  # type: ignore[import-not-found]  # found by the path above
from evaluation_data import find_data  # type: ignore[import-not-found]

from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import collect_halves, predict, thin
from rankship_pipeline.evaluate.curvature import SAMPLES, collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import make_metric
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.records import Form, RankPlan
from rankship_pipeline.models.layers import count_parameters, find_layers
from rankship_pipeline.quantise.in_order import round_layers
from rankship_pipeline.quantise.sizes import SIMULATED
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.price import price_bytes
from rankship_pipeline.ranks.sensitivity import measure_curves
from rankship_pipeline.ranks.stats import LayerStats, gather_stats
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.recover.batchnorm import settle_batchnorm
from rankship_pipeline.recover.reconstruct import reconstruct

FORMS: tuple[Form, ...] = ("svd", "spatial", "tucker")
PROBES = 64  # calibration images on which layers' damages are measured
# name → the types on offer, the forms
WAYS: dict[str, tuple[tuple[Precision, ...], tuple[Form, ...]]] = {
    "dense, mixed": (("int8", "int4"), ()),
    "ranks at 8 bits": (("int8",), FORMS),
    "ranks and bits": (("int8", "int4"), FORMS),
}


def main() -> None:
    """Measure every way at every size and seed, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--smaller", type=float, nargs="+", default=[6.0, 8.0, 10.0, 12.0])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--sensitivity", default="relative")
    parser.add_argument("--reconstruct", action="store_true", help="refit layers before rounding; slow")
    parser.add_argument("--to", type=Path, required=True)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        subject = Subject(seed)
        for name in given.ways:
            for smaller in given.smaller:
                row = subject.measure(name, smaller, given.sensitivity, reconstructed=given.reconstruct)
                rows.append(row)
                sys.stderr.write(json.dumps({key: row[key] for key in row if key != "layers"}) + "\n")
                given.to.write_text(json.dumps({"dense": subject.dense, "rows": rows}, indent=1) + "\n")


class Subject:
    """The net with its calibration images of one seed, decomposed once."""

    def __init__(self, seed: int) -> None:
        self.seed, self.data = seed, load_resnet20(seed)
        self.model = resnet20().eval()
        self.model.load_state_dict(load_file(find_data("cifar10_resnets/resnet20.safetensors")))
        self.inputs = (self.data["calibration"]["resnet20"],)
        self.layers = find_layers(self.model)
        grams = collect_halves(collect_grams, self.model, self.inputs, self.layers)
        curvatures = collect_halves(collect_curvatures, self.model, thin(self.inputs, SAMPLES), self.layers)
        samples = len(self.inputs[0])
        metrics = {name: make_metric(gram, curvatures[name], samples) for name, gram in grams.items()}
        self.analysis: Analysis = analyse(self.model, self.layers, metrics, "swift")
        self.teacher = predict(self.model, self.inputs)
        self.dense = self._score(self.model)
        self._stats: dict[str, tuple[LayerStats, ...]] = {}

    def measure(self, name: str, smaller: float, sensitivity: str, *, reconstructed: bool) -> dict[str, Any]:
        """The accuracy of the rounded model, and what it is made of; None where no plan is that small."""
        began = time.process_time()
        weights, forms = WAYS[name]
        fixed = count_parameters(self.model) - sum(layer.parameters for layer in self.layers)
        price = price_bytes(fixed, weights, SIMULATED)
        budget = int(4 * count_parameters(self.model) / smaller)
        choice = RankChoice(step=1, forms=forms, sensitivity=sensitivity)  # type: ignore[arg-type]  # an argument
        row: dict[str, Any] = {"way": name, "seed": self.seed, "smaller": smaller}
        if name not in self._stats:
            stats = gather_stats(self.analysis, choice, {}, price)
            if sensitivity == "kl":
                stats = measure_curves(self.analysis, stats, thin(self.inputs, PROBES))
            self._stats[name] = stats
        try:
            plan: RankPlan = allocate(self._stats[name], fixed, budget, choice, price)
        except BudgetInfeasible as error:
            return {**row, "accuracy": None, "why": str(error)}
        make = partial(reconstruct, inputs=self.inputs) if reconstructed else fill
        floats = make(self.analysis, plan.factors)
        rounded, reestimated = self._settle(round_layers(floats, plan.weights, self.inputs, SIMULATED))
        return {
            **row,
            "accuracy": self._score(rounded),
            "bytes": plan.total_cost,
            "reestimated": reestimated,
            "cpu_seconds": round(time.process_time() - began, 1),
            "layers": {layer.name: str(layer.stored) for layer in plan.layers},
        }

    def _settle(self, model: nn.Module) -> tuple[nn.Module, bool]:
        def lead(first: nn.Module, second: nn.Module) -> float:
            own, other = (measure_divergence(one, self.inputs, self.teacher) for one in (first, second))
            return own - other

        return settle_batchnorm(model, self.inputs, "auto", lead)

    def _score(self, model: nn.Module) -> float:
        """The percentage of the test images that it gets right."""
        images, labels = self.data["test_inputs"], self.data["test_labels"]
        assert isinstance(images, Tensor)  # noqa: S101 - as the loader gives them
        (logits,) = predict(model, (images,)).values()
        return 100 * float((logits.argmax(1) == labels).double().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
