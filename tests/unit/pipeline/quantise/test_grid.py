"""Grids: integers, scales and blocks are found again in the float weights, as toolchains find them."""

import pytest
import torch
from torch import nn

from make.conv1ds import make_conv1d
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.models.layers import Factorable
from rankship_pipeline.quantise.grid import (
    LARGEST,
    find_block,
    find_scales,
    is_on_grid,
    read_integers,
    read_rows,
    write_rows,
)

GRIDS: list[tuple[Precision, int | None]] = [("int8", None), ("int4", None), ("int4", 32)]


@pytest.mark.parametrize(("precision", "block"), GRIDS)
def test_integers_times_scales_are_found_again(precision: Precision, block: int | None) -> None:
    torch.manual_seed(0)
    limit = LARGEST[precision]
    integers = torch.randint(-limit, limit + 1, (5, 64))
    integers[:, ::32] = limit
    scales = torch.rand(5, 64 // block if block else 1) + 0.01
    matrix = integers * scales.repeat_interleave(64 // scales.shape[1], 1)
    assert torch.equal(read_integers(matrix, precision, block), integers.to(torch.int8))
    torch.testing.assert_close(find_scales(matrix, precision, block), scales)
    assert is_on_grid(matrix, precision, block)
    assert not is_on_grid(matrix + 0.3 * scales.min() * torch.rand(5, 64), precision, block)


def test_a_row_of_zeros_has_zeros_for_integers() -> None:
    matrix = torch.zeros(2, 32)
    assert is_on_grid(matrix, "int4", 32)
    assert not read_integers(matrix, "int4", 32).any()


def test_a_block_that_lacks_the_largest_integer_is_on_another_grid() -> None:
    matrix = torch.tensor([[7.0, 1.0, -3.0], [5.0, 2.0, 0.0]])
    assert read_integers(matrix, "int4")[0].tolist() == [7, 1, -3]
    assert read_integers(matrix, "int4")[1].tolist() == [7, 3, 0]
    assert not is_on_grid(matrix, "int4")


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 4), (4, 6)),
        (nn.Conv2d(3, 4, 2), (4, 12)),
        (nn.Embedding(9, 4), (9, 4)),
        (nn.ConvTranspose2d(3, 4, 2), (4, 12)),
        (make_conv1d(6, 4), (4, 6)),
    ],
)
def test_rows_are_output_channels_and_tokens(module: Factorable, shape: tuple[int, int]) -> None:
    rows = read_rows(module).clone()
    assert tuple(rows.shape) == shape
    before = module.weight.detach().clone()
    write_rows(module, 2 * rows)
    torch.testing.assert_close(module.weight.detach(), 2 * before)
    axis = 0 if shape[0] == before.shape[0] else 1  # the module's axis that the rows are
    torch.testing.assert_close(rows.norm(dim=1), before.movedim(axis, 0).flatten(1).norm(dim=1))


def test_only_int4_of_linear_layers_and_tables_has_blocks() -> None:
    assert find_block("linear", 64, "int4") == find_block("embedding", 32, "int4") == 32
    assert find_block("linear", 40, "int4") is None
    assert find_block("linear", 64, "int8") is None
    assert find_block("convolution", 64, "int4") is None
