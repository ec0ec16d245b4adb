"""Layers that are measured together: the sum of their costs, and those that read fewer neurons."""

from pathlib import Path

import pytest

from rankship_benchmarks.costs.probes import LIMITS, Probe, make_probes, prove
from rankship_benchmarks.costs.sweeps import join_ratios
from rankship_benchmarks.stats.estimates import Estimate
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.ranks.call_sites import Site
from rankship_targets.session.runner import HostRunner

UP = Site(kind="linear", rows=24, columns=16, bias=False, input_shape=(1, 5, 16))
DOWN = Site(kind="linear", rows=16, columns=24, bias=False, input_shape=(1, 5, 24))


def at(value: float, spread: float | None = 0.1) -> Estimate:
    span = (None, None) if spread is None else (value - spread, value + spread)
    return Estimate(value=value, low=span[0], high=span[1], confidence=0.95, rounds=9)


def test_layers_together_cost_the_sum_of_their_shares() -> None:
    found = join_ratios([at(0.2), at(0.8), at(0.8)], [3.0, 1.0, 0.0])
    assert found.value == pytest.approx(0.25 * 0.8 + 0.75 * 0.2)
    assert found.low is not None
    assert found.low == pytest.approx(found.value - 0.1)
    assert join_ratios([at(0.3), at(0.3)], [1.0, 2.0]) == at(0.3)
    assert join_ratios([at(0.3), at(0.5)], [0.0, 0.0]).value == pytest.approx(0.4)
    assert join_ratios([at(0.3), at(0.5, None)], [1.0, 1.0]).low is None


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_layer_that_reads_fewer_neurons_is_timed_on_fewer(tmp_path: Path, weights: Precision) -> None:
    store, narrow = Store(tmp_path), Factors(form="width", rank=16, input_rank=8)
    ways = [Stored(), Stored(factors=narrow, weights=weights)]
    dense, narrowed = make_probes([Probe(DOWN, one, 3, "dynamic") for one in ways], "onnx", store)
    assert [one.inputs[0].shape for one in (dense, narrowed)] == [(1, 5, 24), (1, 5, 8)]
    assert narrowed.parameters == 3 * 16 * 8
    assert narrowed.key.precision == weights
    assert prove(narrowed, store, HostRunner(), LIMITS)[2].max_relative_error < 0.02
    (fed,) = make_probes([Probe(UP, Stored(factors=Factors(form="width", rank=8)), 3)], "onnx", store)
    assert (fed.inputs[0].shape, fed.outputs[0].shape, fed.parameters) == ((1, 5, 16), (1, 5, 8), 3 * 8 * 16)
