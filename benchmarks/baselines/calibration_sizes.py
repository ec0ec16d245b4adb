# ruff: noqa: INP001 - a script, no package
"""How good a compressed model is from 8 to 1,000 calibration samples: plain SVD, inputs as sampled, and shrunk.

    RANKSHIP_DATA=… python benchmarks/baselines/calibration_sizes.py resnet20 --out sizes.json

Every row has the same budget, the knapsack of the default recipe (plain SVD also with uniform ranks), and no labels.
The samples are the first ones of each seed's calibration data; the test data are the study's own. `moments` is a
regression on scikit-learn's digits, trained here: an image's ink and its two spreads, each in a unit of its own.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.analysis import analyse
from rankship_pipeline.flow.preflight import prepare, redraw
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.records import Form
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.weights import hash_tensors
from rankship_pipeline.ranks.price import price_parameters
from rankship_pipeline.recipe.choices import Comparison
from rankship_pipeline.recipe.rules import read_recipe

STUDIES = Path(__file__).resolve().parent.parent / "studies"
FORMS: tuple[Form, ...] = ("svd", "spatial", "tucker")
WAYS = (
    Comparison(name="plain, uniform", merge="average", ranks="uniform", whitening="plain"),
    Comparison(name="plain, knapsack", merge="average", ranks="knapsack", whitening="plain", forms=FORMS),
    Comparison(
        name="as sampled",
        merge="average",
        ranks="knapsack",
        whitening="eigen",
        forms=FORMS,
        curvature=True,
        shrink=False,
    ),
    Comparison(name="shrunk", merge="average", ranks="knapsack", whitening="eigen", forms=FORMS, curvature=True),
)
KEPT = {"resnet20": 0.5, "minilm-sst2": 0.5, "moments": 0.3}
MOMENTS = """
name = "moments"
[[models]]
name = "a"
factory = "calibration_sizes.py:make_moments"
train = "calibration_sizes.py:train_moments"
[data]
loader = "calibration_sizes.py:load_moments"
[budget]
kept_parameters = 0.3
[ranks]
step = 4
[quality]
kind = "regression"
"""


def make_moments() -> nn.Module:
    """Return a network of three hidden layers from 64 pixels to three numbers."""
    return nn.Sequential(
        nn.Linear(64, 192), nn.ReLU(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 96), nn.ReLU(), nn.Linear(96, 3)
    )


def list_moments() -> tuple[Tensor, Tensor]:
    """Return the images (1797, 64) in 0 to 1, and the ink, its spread down and its spread across (1797, 3)."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    ink, places = images.sum((1, 2)), torch.arange(8.0)
    spreads = []
    for sums in (images.sum(2), images.sum(1)):
        mean = (sums * places).sum(1) / ink
        spreads.append((sums * (places - mean[:, None]) ** 2).sum(1) / ink)
    return images.flatten(1), torch.stack([1000 * ink, spreads[0], spreads[1] / 1000], 1)


def train_moments(model: nn.Module, seed: int) -> None:
    """Fit the first 1,000 images, each target in units of its own spread."""
    x, y = (part[:1000] for part in list_moments())
    mean, spread = y.mean(0), y.std(0)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(1500):
        batch = torch.randint(0, 1000, (128,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[batch]), (y[batch] - mean) / spread)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        optimizer.step()
    last: Any = list(model.children())[-1]
    with torch.no_grad():
        last.weight.mul_(spread[:, None])
        last.bias.mul_(spread).add_(mean)


def load_moments(seed: int) -> dict[str, Any]:
    """Return 1,000 training images in an order of the seed's, and the other 797 with their moments."""
    x, y = list_moments()
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    return {"calibration": {"a": x[order]}, "test_inputs": x[1000:], "test_labels": y[1000:]}


def limit(prepared: Prepared, samples: int) -> Prepared:
    """Return the same models with the first samples of the calibration data."""
    data = prepared.data
    fewer = {name: tuple(one[:samples] for one in inputs) for name, inputs in data.calibration.items()}
    return replace(
        prepared,
        data=replace(data, calibration=fewer),
        calibration_sha256={name: hash_tensors(inputs) for name, inputs in fewer.items()},
    )


def measure(prepared: Prepared, store: Store, kept: float) -> tuple[dict[str, float], float]:
    """Return the score of every way, and that of the dense model."""
    stages = Stages(prepared, store, Steps())
    budgeted = Budgeted(prepared, price_parameters(prepared.fixed_parameters), int(kept * prepared.dense_parameters))
    merged, interference = stages.merge("average")
    (dense,) = Scores(stages).evaluate(merged, "merged")
    found = {}
    for way in WAYS:
        metrics, _ = stages.choose_metrics(merged, way)
        analysis = analyse(merged.module, prepared.layers, metrics, way.whitening)
        module, _ = stages.make_compressed(budgeted, analysis, way, interference)
        module, _ = stages.settle(module)
        data = prepared.data
        assert data.test_labels is not None  # noqa: S101 - every subject has some
        found[way.name] = prepared.court.score(module, data.test_inputs, data.test_labels, way.name).value
    return found, dense.value


def main() -> None:
    """Measure every size and seed, and write all scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=KEPT)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    path = STUDIES / f"{arguments.subject}.toml"
    with TemporaryDirectory() as folder:
        if arguments.subject == "moments":
            path = Path(folder, "moments.toml")
            path.write_text(MOMENTS, encoding="utf-8")
            path.with_name("calibration_sizes.py").write_text(Path(__file__).read_text(encoding="utf-8"))
        whole, store = prepare(read_recipe(path), path.parent), Store(Path(folder, "store"))
        rows: list[Mapping[str, Any]] = []
        for seed in arguments.seeds:
            drawn = redraw(whole, seed)
            for size in arguments.sizes:
                begun = time.process_time()
                found, dense = measure(limit(drawn, size), store, KEPT[arguments.subject])
                rows.append({"seed": seed, "samples": size, "dense": dense, **found})
                seconds = time.process_time() - begun
                scores = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
                print(f"seed {seed}, {size} samples: {scores}  ({seconds:.0f} CPU-s)", flush=True)  # noqa: T201
                write_atomic(arguments.out, json.dumps({"subject": arguments.subject, "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
