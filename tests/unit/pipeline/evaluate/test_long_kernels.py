import pytest
import torch
from torch import nn

from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.evaluate.long_kernels import is_long
from rankship_pipeline.evaluate.rows import as_rows
from rankship_pipeline.models.layers import find_layers


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(3, 4, 20, padding=7), (5, 3, 50)),
        (nn.Conv2d(3, 4, (1, 17), padding=(0, 3)), (4, 3, 6, 40)),
        (nn.Conv2d(2, 4, (16, 1), padding=(4, 2), bias=False), (4, 2, 40, 3)),
        (nn.Conv1d(2, 4, 16, padding="same", padding_mode="reflect"), (70, 2, 40)),
    ],
    ids=["sound", "wide", "high", "padded"],
)
def test_the_gram_under_a_long_kernel_is_that_of_its_patches(module: nn.Conv1d | nn.Conv2d, shape: list[int]) -> None:
    net, x = nn.Sequential(module), torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    assert is_long(module)
    patches = as_rows(module, x).double()
    found = collect_grams(net, (x,), find_layers(net))["0"]
    torch.testing.assert_close(found, patches.T @ patches / len(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize(
    "module", [nn.Conv1d(1, 2, 15), nn.Conv1d(1, 2, 32, stride=2), nn.Conv1d(1, 2, 32, dilation=2), nn.Conv2d(1, 2, 16)]
)
def test_other_kernels_are_not_long(module: nn.Conv1d | nn.Conv2d) -> None:
    assert not is_long(module)


def test_a_gram_of_many_columns_is_symmetric_and_that_of_its_rows() -> None:
    net, x = nn.Sequential(nn.Linear(2100, 2, bias=False)), torch.randn(6, 2100)
    found = collect_grams(net, (x,), find_layers(net))["0"]
    torch.testing.assert_close(found.double(), x.double().T @ x.double() / 6, rtol=0, atol=1e-6)
    assert torch.equal(found, found.T)
    assert torch.equal(found, found.T)
