"""tucker: 1×1 to r1 channels, the full kernel from r1 to r2, 1×1 to the outputs (Tucker-2)."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.decompose import balance, truncate
from rankship_pipeline.factors.decomposition import Decomposition, find_directions
from rankship_pipeline.factors.eigen import find_eigenvalues
from rankship_pipeline.factors.operators import Operator, cut_convolution, make_pointwise, pad_basis
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Convolution, Factorable, Layer

# The most values offered for each of the two widths: all pairs would be thousands.
_GRID = 16


def list_factors(layer: Layer, step: int) -> Iterator[Factors]:
    """Pairs of widths on a grid, grouped by input width; none for a layer without a kernel."""
    inner = _space(layer.channels, step) if max(layer.kernel) > 1 else ()
    return (Factors(form="tucker", rank=k, input_rank=one) for one in inner for k in _space(layer.rows, step))


def list_operators(layer: Layer, factors: Factors) -> tuple[Operator, ...]:
    """(r1, in) at every input, (r2, r1·kh·kw), then (rows, r2)."""
    inner, size = _read_width(factors), layer.kernel[0] * layer.kernel[1]
    first = Operator(inner, layer.channels, on_outputs=(False, False))
    return first, Operator(factors.rank, inner * size), Operator(layer.rows, factors.rank)


def measure_errors(taken: Decomposition, step: int) -> Iterator[tuple[Factors, float]]:
    """The share lost by the best r2 components of the best fit on the first r1 mixtures of channels."""
    offers = list(list_factors(taken.layer, step))
    if not offers:
        return
    size = taken.layer.kernel[0] * taken.layer.kernel[1]
    held = taken.hold(taken.remember(_find_basis))  # (r, in·kh·kw)
    gram, seen = held.new_zeros(len(held), len(held)), 0
    for inner, some in groupby(offers, _read_width):  # widths ascend: each adds its columns to the last one's Gram
        gram += held[:, seen : inner * size] @ held[:, seen : inner * size].T
        seen = inner * size
        energy = find_eigenvalues(gram).clamp_min(0).flip(0)
        base = taken.total - float(energy.sum())
        for one in some:
            lost = (base + float(energy[one.rank :].sum())) / taken.total if taken.total else 0.0
            yield one, max(0.0, lost)


def make_weights(taken: Decomposition, factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """(r1, in, 1, 1), (r2, r1, kh, kw), (rows, r2, 1, 1)."""
    inner, rank = _read_width(factors), factors.rank
    height, width = taken.layer.kernel
    basis = pad_basis(taken.remember(_find_basis), inner)  # (r1, in)
    A, core = truncate(taken.project(basis), rank)  # (rows, r2), (r2, r1·kh·kw)
    mixed, basis = balance(core.reshape(rank, inner, -1).transpose(1, 2).reshape(-1, inner), basis)
    core = mixed.reshape(rank, height * width, inner).transpose(1, 2)
    return basis[:, :, None, None], core.reshape(rank, inner, height, width), A[:, :, None, None]


def compose(layer: Layer, weights: Sequence[Tensor]) -> Tensor:
    """The core multiplied by the first and the last operator."""
    first, core, last = weights
    return torch.einsum("or,rphw,pi->oihw", last[..., 0, 0], core, first[..., 0, 0]).reshape(layer.rows, -1)


def make_modules(module: Factorable, factors: Factors) -> list[nn.Module]:
    """A 1×1 convolution, a small one with the module's kernel, stride, padding and dilation, and another 1×1."""
    assert isinstance(module, Convolution)  # noqa: S101 - list_factors offers nothing else
    inner = _read_width(factors)
    return [
        make_pointwise(module, module.in_channels, inner),
        cut_convolution(module, inner, factors.rank),
        make_pointwise(module, factors.rank, module.out_channels, bias=module.bias is not None),
    ]


def _find_basis(taken: Decomposition) -> Tensor:
    """Mixtures of input channels for the first operator, best first: (R, in)."""
    channels, size = taken.layer.channels, taken.layer.columns // taken.layer.channels
    marginal = torch.einsum("ixjx->ij", taken.gram.reshape(channels, size, channels, size))
    return find_directions(taken.weighted.flatten(2).transpose(1, 2).reshape(-1, channels), marginal)


def _read_width(factors: Factors) -> int:
    """r1."""
    return factors.input_rank or 0


def _space(limit: int, step: int) -> range:
    """Multiples of `step` up to the limit, thinned to _GRID of them."""
    coarse = step * max(1, -(-limit // (step * _GRID)))
    return range(coarse, limit + 1, coarse)
