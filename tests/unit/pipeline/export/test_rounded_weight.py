"""Every way in which a file can store other weights than were chosen is named."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from make.rounded import round_weight
from rankship_pipeline.export.rounded_weight import RoundedWeight, check_weights, find_same, store
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.quantise.grid import find_scales, read_integers


def make(precision: Precision = "int8", seed: int = 0) -> RoundedWeight:
    torch.manual_seed(seed)
    return round_weight("layer", torch.randn(6, 64), precision)[1]


def test_what_was_chosen_passes() -> None:
    check_weights([make(), make("int4", 1)], [make("int4", 1), make()], where="file")


def test_a_grid_gives_the_integers_and_scales_that_are_compared() -> None:
    torch.manual_seed(0)
    weight, one = round_weight("layer", torch.randn(6, 64), "int8")
    found = store("layer", "int8", read_integers(weight, "int8"), find_scales(weight, "int8"))
    check_weights([found], [one], where="file")


def test_equal_blocks_are_one_row() -> None:
    one = make()
    check_weights([one], [replace(one, scales=np.repeat(one.scales, 2, axis=1))], where="file")


def test_a_row_of_zeros_may_have_any_scale() -> None:
    one, zero = make(), make().integers.copy()
    zero[2] = 0
    scales = one.scales.copy()
    scales[2] = 9
    check_weights([replace(one, integers=zero)], [replace(one, integers=zero, scales=scales)], where="file")


FAULTS = {
    "an integer": (lambda one: replace(one, integers=one.integers ^ (np.arange(64) == 3)), "6 of 384 integers differ"),
    "stale integers": (lambda one: replace(one, integers=make(seed=5).integers), r"\d+ of 384 integers differ"),
    "a scale": (
        lambda one: replace(one, scales=one.scales * [[1], [1], [1.001], [1], [1], [1]]),
        "the scales of layer",
    ),
    "one scale for all": (lambda one: replace(one, scales=one.scales.max() + 0 * one.scales), "the scales of layer"),
    "the wrong way round": (
        lambda one: replace(one, integers=one.integers.T.copy()),
        "no rounded weight of shape 6x64",
    ),
    "a dropped zero point": (lambda one: replace(one, integers=one.integers - 1), "384 of 384 integers differ"),
    "another type": (lambda one: replace(one, precision="int4"), "layer is stored as int4, not as int8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(BuildError, match=rf"file: weights [\s\S]*layer: {message}"):
        check_weights([make()], [change(make())], where="file")  # type: ignore[no-untyped-call]


def test_a_weight_is_found_by_its_numbers() -> None:
    ones = [make(seed=seed) for seed in range(3)]
    assert find_same(ones[1].matrix, ones) is ones[1]
    assert find_same(ones[1].matrix * (1 + 1e-7), ones) is ones[1]
    assert find_same(make(seed=4).matrix, ones) is None
    assert find_same(ones[1].matrix[:5], ones) is None


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_weight_is_found_after_its_rows_were_multiplied(precision: Precision) -> None:
    one, other = make(precision), make(precision, 1)
    factors = np.array([[2.0], [-0.5], [1.0], [4.0], [-1.0], [0.25]], np.float32)
    found = find_same(one.matrix * factors, [other, one])
    assert found is not None
    assert np.allclose(found.matrix, one.matrix * factors)
    assert (found.integers == one.integers * np.sign(factors)).all()
    assert (found.scales > 0).all()
    assert find_same(one.matrix * np.linspace(1, 2, 64, dtype=np.float32), [one]) is None, "its columns are others"
