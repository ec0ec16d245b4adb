"""Every merge of one fixed set of models, against numbers stored when they were last judged right.

They change only when a method changes on purpose. Then regenerate, read the difference, and commit it with the change:

    RANKSHIP_REGENERATE_GOLDEN=1 pytest tests/golden/test_merges.py; git diff tests/golden
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from rankship_pipeline.merge import Sources, merge_states
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.models.weights import State
from rankship_pipeline.recipe.merge_methods import MergeMethod, fill_settings

STORED = Path(__file__).with_name("merges.json")
# sums and products of single elements only: the same bits on every machine
ELEMENTWISE: tuple[MergeMethod, ...] = ("average", "task-arithmetic", "ties", "dare", "della")
LAYERS = (
    Layer(name="fc", rows=10, columns=14),
    Layer(name="conv", rows=6, columns=12, kind="convolution", kernel=(2, 2)),
    Layer(name="words", rows=4, columns=9, kind="embedding"),
)
SHAPES = {"fc.weight": (10, 14), "fc.bias": (10,), "conv.weight": (6, 3, 2, 2), "words.weight": (9, 4)}


def make_sources() -> Sources:
    random = np.random.default_rng(2026)
    base: State = {name: torch.tensor(random.normal(size=shape)) for name, shape in SHAPES.items()}
    states: list[State] = [
        {name: value + 0.1 * torch.tensor(random.normal(size=tuple(value.shape))) for name, value in base.items()}
        for _ in range(2)
    ]
    grams = []
    for _ in states:
        X = {layer.name: torch.tensor(random.normal(size=(30, layer.columns))) for layer in LAYERS[:2]}
        grams.append({name: x.T @ x for name, x in X.items()} | {"words": torch.tensor(random.uniform(size=9))})
    fishers: list[State] = [
        {name: torch.tensor(random.uniform(size=shape)) for name, shape in SHAPES.items()} for _ in states
    ]
    return Sources(states=states, base=base, layers=LAYERS, grams=grams, fishers=fishers)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the code gives today: two sums over every tensor, and a hash where the bits are the machine's in no way."""
    sources = make_sources()
    table: dict[str, Any] = {}
    for method in get_args(MergeMethod):
        merged = merge_states(method, sources, fill_settings(method, {}), seed=7)
        table[method] = {
            "sums": {
                name: [float(value.sum()), float((value.flatten() * torch.arange(value.numel())).sum())]
                for name, value in merged.items()
            }
        }
        if method in ELEMENTWISE:
            bits = b"".join(merged[name].contiguous().numpy().tobytes() for name in SHAPES)
            table[method]["sha256"] = hashlib.sha256(bits).hexdigest()
    if os.environ.get("RANKSHIP_REGENERATE_GOLDEN"):
        assert not os.environ.get("CI"), "golden numbers are never regenerated in CI"
        STORED.write_text(json.dumps(table, indent=1) + "\n")
        pytest.fail(f"{STORED.name} is written anew: read its difference, then run again without the variable")
    return table


@pytest.mark.parametrize("method", get_args(MergeMethod))
def test_a_merge_is_the_stored_one(method: MergeMethod, found: dict[str, Any]) -> None:
    stored = json.loads(STORED.read_text())
    assert set(stored) == set(get_args(MergeMethod))
    assert stored[method].get("sha256") == found[method].get("sha256")
    for name, sums in stored[method]["sums"].items():
        assert found[method]["sums"][name] == pytest.approx(sums, rel=1e-8, abs=1e-8)
