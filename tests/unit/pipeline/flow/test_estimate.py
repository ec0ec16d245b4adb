"""Estimates from shapes and counts alone: more work is never less, and what dominates is named."""

from dataclasses import replace
from typing import Any

import pytest

from rankship_pipeline.flow.estimate import StageEstimate, Work, estimate
from rankship_pipeline.flow.pace import Pace
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.recipe.choices import (
    Comparison,
    DataChoice,
    FactoriseChoice,
    RankChoice,
    Recipe,
    RefineChoice,
    Source,
)
from rankship_pipeline.recipe.export_choices import ExportChoice

STEM = Layer(name="stem", rows=64, columns=27, kind="convolution", kernel=(3, 3))
WIDE = Layer(name="wide", rows=512, columns=4608, kind="convolution", kernel=(3, 3))
HEAD = Layer(name="head", rows=10, columns=512)
WEIGH = "weigh outputs by their effect on predictions"


def make_work(*layers: Layer, samples: int = 64, forward_seconds: float = 1e-3, **recipe: Any) -> Work:  # noqa: ANN401 - a recipe's tables
    layers = layers or (STEM, WIDE, HEAD)
    return Work(
        recipe=Recipe(
            name="r",
            models=(Source(name="a", factory="net.py:make", weights="a.safetensors"),),
            data=DataChoice(loader="net.py:load"),
            **({"export": ExportChoice(formats=("onnx",))} | recipe),
        ),
        pace=Pace(
            forward_seconds=forward_seconds,
            activation_bytes=1_000_000,
            output_bytes=4_000,
            positions={layer.name: 49 for layer in layers},
            product64_flops=4e10,
            product32_flops=8e10,
            eigen_flops=2e10,
            operators=50,
        ),
        layers=layers,
        calibration={"a": samples},
        tests=100,
        parameters=sum(layer.parameters for layer in layers),
        has_norms=True,
        resident_bytes=0,
    )


def by_name(work: Work) -> dict[str, StageEstimate]:
    stages = estimate(work)
    found = {one.name: one for one in stages}
    assert len(found) == len(stages), "two stages of one name"
    return found


def find_slowest(work: Work) -> str:
    return max(estimate(work), key=lambda one: one.seconds).name


@pytest.mark.parametrize(
    ("more", "stages"),
    [
        (make_work(samples=128), ["calibrate a", WEIGH, "fidelity"]),
        (make_work(STEM, replace(WIDE, columns=9216), HEAD), ["calibrate a", "compress: knapsack"]),
        (make_work(STEM, replace(WIDE, rows=1024), HEAD), [WEIGH, "compress: knapsack", "export dense to onnx"]),
        (make_work(forward_seconds=0.1), ["calibrate a", WEIGH, "score"]),
        (make_work(ranks=RankChoice(sensitivity="kl")), ["compress: knapsack"]),
        (make_work(factorise=FactoriseChoice(reconstruct=True)), ["compress: knapsack"]),
    ],
    ids=["samples", "columns", "rows", "forward pass", "measured divergence", "reconstruction"],
)
def test_more_work_takes_longer_where_it_is_done_and_never_less_elsewhere(more: Work, stages: list[str]) -> None:
    before, after = by_name(make_work()), by_name(more)
    assert before.keys() == after.keys()
    assert {name for name in stages if after[name].seconds > before[name].seconds} == set(stages)
    assert all(after[name].seconds >= before[name].seconds for name in before)
    assert all(after[name].peak_bytes >= before[name].peak_bytes for name in before)


def test_the_widest_layer_is_the_costliest() -> None:
    stages = by_name(make_work())
    for name in ("calibrate a", "compress: knapsack"):
        assert max(stages[name].layer_seconds.items(), key=lambda one: one[1])[0] == "wide"
        assert max(stages[name].layer_bytes.items(), key=lambda one: one[1])[0] == "wide"
    assert stages["calibrate a"].peak_bytes >= 12 * WIDE.columns**2, (
        "one half of the samples in float64, one in float32"
    )


@pytest.mark.parametrize("shape", [(4096, 512), (512, 4096)])
def test_a_layer_of_one_long_side_costs_less_where_the_other_tells_all(shape: tuple[int, int]) -> None:
    layer = Layer(name="long", rows=shape[0], columns=shape[1])
    whole, short = by_name(make_work(layer)), by_name(make_work(replace(layer, only_factored=True)))
    cheaper = {name for name in whole if short[name].seconds < whole[name].seconds}
    assert cheaper == {"calibrate a" if layer.columns > layer.rows else WEIGH, "compress: knapsack"}
    assert {name for name in whole if short[name].peak_bytes < whole[name].peak_bytes} >= cheaper - {
        "compress: knapsack"
    }
    assert all(short[name].peak_bytes <= whole[name].peak_bytes for name in whole)


def test_what_dominates_follows_from_the_recipe() -> None:
    assert find_slowest(make_work(STEM, HEAD)) == "export dense to onnx"
    relative = make_work(STEM, HEAD, forward_seconds=0.1, samples=128, ranks=RankChoice(sensitivity="relative"))
    assert find_slowest(replace(relative, has_norms=False)) == WEIGH
    assert find_slowest(make_work(refine=RefineChoice(cpu_seconds=900))) == "refine without labels"
    assert find_slowest(make_work(forward_seconds=0.1, ranks=RankChoice(sensitivity="kl"))) == "compress: knapsack"


def test_only_the_stages_that_a_recipe_has_are_listed() -> None:
    plain = by_name(make_work(factorise=FactoriseChoice(whitening="plain"), export=ExportChoice(formats=())))
    assert list(plain) == ["load a", "calibrate a", "nothing to merge", "compress: knapsack", "score", "fidelity"]
    ways = (
        Comparison(name="b", merge="average", ranks="arp", whitening="plain"),
        Comparison(name="c", merge="average", ranks="uniform", whitening="plain"),
    )
    more = list(by_name(make_work(compare=ways, refine=RefineChoice(steps=10))))
    assert more[-2:] == ["compress: b", "compress: c"]
    assert "refine without labels" in more


def test_a_table_of_tokens_has_no_square_of_its_vocabulary() -> None:
    table = Layer(name="table", rows=128, columns=50_000, kind="embedding")
    stages = by_name(make_work(table, HEAD))
    assert stages["calibrate a"].layer_bytes["table"] == 12 * table.columns
    assert stages["compress: knapsack"].layer_seconds["table"] < 60
