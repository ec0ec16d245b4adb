"""svd: n→k→m; a convolution becomes k filters of the full kernel, then 1×1 (channel SVD).

A transposed convolution becomes 1×1 to k channels, then one with the full kernel.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from rankship_pipeline.factors.decompose import truncate
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.operators import Operator, cut_convolution, make_pointwise, narrow_transposed
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Convolution, Factorable, Layer, Transposed, describe


def list_factors(layer: Layer, step: int) -> Iterator[Factors]:
    """Every rank up to min(rows, columns)."""
    return (Factors(rank=k) for k in range(step, min(layer.rows, layer.columns) + 1, step))


def list_operators(layer: Layer, factors: Factors) -> tuple[Operator, ...]:
    """(k, columns), then (rows, k)."""
    return Operator(factors.rank, layer.columns), Operator(layer.rows, factors.rank)


def measure_errors(taken: Decomposition, step: int) -> Iterator[tuple[Factors, float]]:
    """Σ_{j>k} σ_j² / Σ σ_j², with what the spectrum misses of the dense layer on both sides."""
    energy, total, missed = taken.spectrum.energy, taken.total, taken.missed
    lost = [*energy.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    tails = [(tail + missed) / total if total else 0.0 for tail in lost]
    return ((one, tails[min(one.rank, len(energy))]) for one in list_factors(taken.layer, step))


def make_weights(taken: Decomposition, factors: Factors) -> tuple[Tensor, Tensor]:
    """(k, columns), (rows, k)."""
    A, B = truncate(taken.spectrum, factors.rank)
    return B, A


def compose(_layer: Layer, weights: Sequence[Tensor]) -> Tensor:
    """A·B."""
    B, A = weights
    return A @ B


def make_modules(module: Factorable, factors: Factors) -> list[nn.Module]:
    """A narrower embedding, linear layer or convolution, then a linear layer or 1×1 convolution."""
    has_bias, k = getattr(module, "bias", None) is not None, factors.rank
    if isinstance(module, nn.Embedding):
        table = nn.Embedding(module.num_embeddings, k, module.padding_idx)
        return [table, nn.Linear(k, module.embedding_dim, bias=False)]
    if isinstance(module, Convolution):
        outwards = make_pointwise(module, k, module.out_channels, bias=has_bias)
        return [cut_convolution(module, module.in_channels, k), outwards]
    if isinstance(module, Transposed):
        return [make_pointwise(module, module.in_channels, k), narrow_transposed(module, k)]
    layer = describe("", module)
    return [nn.Linear(layer.columns, k, bias=False), nn.Linear(k, layer.rows, bias=has_bias)]
