"""spatial: a kernel of height kh and width 1 to k channels, then one of height 1 and width kw (spatial SVD)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.decompose import balance
from rankship_pipeline.factors.decomposition import Decomposition, find_directions
from rankship_pipeline.factors.operators import Operator, cut_convolution, pad_basis
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Factorable, Layer


def list_factors(layer: Layer, step: int) -> Iterator[Factors]:
    """Every width with fewer parameters than dense; none for a kernel of one, which is already separable."""
    height, width = layer.kernel
    each = layer.channels * height + layer.rows * width
    limit = min(layer.channels * height, layer.rows * width, (layer.parameters - 1) // each)
    return (Factors(form="spatial", rank=k) for k in range(step, limit + 1, step) if min(height, width) > 1)


def list_operators(layer: Layer, factors: Factors) -> tuple[Operator, ...]:
    """(k, in·kh), which strides along the height only, then (rows, k·kw)."""
    height, width = layer.kernel
    first = Operator(factors.rank, layer.channels * height, on_outputs=(True, False))
    return first, Operator(layer.rows, factors.rank * width)


def measure_errors(taken: Decomposition, step: int) -> Iterator[tuple[Factors, float]]:
    """The share lost by the best fit on the first k column filters."""
    offers = list(list_factors(taken.layer, step))
    if not offers:
        return
    held = taken.hold(taken.remember(_find_basis)[: offers[-1].rank])  # energy held by each of the k·kw filters
    for one in offers:
        kept = float((held[:, : one.rank * taken.layer.kernel[1]] ** 2).sum())
        yield one, max(0.0, 1 - kept / taken.total) if taken.total else 0.0


def make_weights(taken: Decomposition, factors: Factors) -> tuple[Tensor, Tensor]:
    """(k, in, kh, 1), (rows, k, 1, kw)."""
    layer, k = taken.layer, factors.rank
    height, width = layer.kernel
    basis = pad_basis(taken.remember(_find_basis), k)  # (k, in·kh)
    second = taken.fit(basis)  # (rows, k·kw)
    A, B = balance(second.reshape(-1, k, width).transpose(1, 2).reshape(-1, k), basis)
    return B.reshape(k, -1, height, 1), A.reshape(layer.rows, width, k).transpose(1, 2).unsqueeze(2)


def compose(layer: Layer, weights: Sequence[Tensor]) -> Tensor:
    """Every pair of a column and a row filter, summed over the channels between them."""
    first, second = weights
    return torch.einsum("okw,kih->oihw", second[:, :, 0], first[..., 0]).reshape(layer.rows, -1)


def make_modules(module: Factorable, factors: Factors) -> list[nn.Module]:
    """Two convolutions, each with the module's stride, padding and dilation along its own axis."""
    assert isinstance(module, nn.Conv2d)  # noqa: S101 - list_factors offers nothing else
    has_bias = module.bias is not None
    return [
        cut_convolution(module, module.in_channels, factors.rank, (True, False)),
        cut_convolution(module, factors.rank, module.out_channels, (False, True), bias=has_bias),
    ]


def _find_basis(taken: Decomposition) -> Tensor:
    """Column filters (in·kh) of the first operator, best first under the columns' mean Gram: (K, in·kh)."""
    channels, (height, width) = taken.layer.channels, taken.layer.kernel
    gram = taken.gram.reshape(channels, height, width, channels, height, width)
    marginal = torch.einsum("ihwjgw->ihjg", gram).reshape(channels * height, -1)
    return find_directions(taken.weighted.permute(0, 3, 1, 2).reshape(-1, channels * height), marginal)
