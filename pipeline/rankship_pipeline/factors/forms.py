"""A layer as a chain of smaller operators: every form's price and error at every rank, and its weights (METHODS §5).

    svd      n→k→m; a convolution becomes k filters of the full kernel, then 1×1 (channel SVD)
    spatial  a kernel of height kh and width 1 to k channels, then one of height 1 and width kw (spatial SVD)
    tucker   1×1 to r1 channels, the full kernel from r1 to r2, 1×1 to the outputs (Tucker-2)

All three are judged by one metric (see factorise.Metric), so that errors compare at equal cost. The SVD is its optimum;
for the other two a basis of the first operator is chosen from marginals of the Gram, and everything after it is the
optimum given that basis, exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rankship_pipeline.factors.decompose import Metric, Spectrum, balance, damp, decompose, find_root, truncate
from rankship_pipeline.foundation.records import Factors, Form
from rankship_pipeline.models.layers import Layer

# Tucker-2 is offered at this many widths of each kind at most: a grid of all pairs would be thousands.
_TUCKER_GRID = 16
# Added to the Gram of a basis as a share of its mean diagonal; costs that share of the energy, and survives rounding.
_DAMPING = 1e-10


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer: what it costs, and the share of the layer's output energy it loses.

    The cost is in parameters until somebody prices it otherwise (see compress.gather_stats).
    """

    factors: Factors
    cost: int
    error: float


def count_parameters(layer: Layer, factors: Factors | None) -> int:
    """Weights of a layer stored so; dense for None."""
    if factors is None:
        return layer.parameters
    if factors.form == "svd":
        return layer.count_factored(factors.rank)
    height, width = layer.kernel
    if factors.form == "spatial":
        return factors.rank * (layer.channels * height + layer.rows * width)
    inner = factors.input_rank or 0
    return layer.channels * inner + height * width * inner * factors.rank + factors.rank * layer.rows


def list_operators(layer: Layer, factors: Factors | None) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of the operators that a layer runs as; looking up an embedding's table is none of them."""
    if factors is None:
        return () if layer.kind == "embedding" else ((layer.rows, layer.columns),)
    height, width = layer.kernel
    k, inner = factors.rank, factors.input_rank or 0
    chains = {
        "svd": ((k, layer.columns), (layer.rows, k)),
        "spatial": ((k, layer.channels * height), (layer.rows, k * width)),
        "tucker": ((inner, layer.channels), (k, inner * height * width), (layer.rows, k)),
    }
    return chains[factors.form][1 if layer.kind == "embedding" else 0 :]


@dataclass(frozen=True)
class Decomposition:
    """One layer's weight (rows, columns), float64, taken apart under one metric."""

    layer: Layer
    weight: Tensor
    metric: Metric
    whitening: str

    @cached_property
    def spectrum(self) -> Spectrum:
        """The whitened SVD of the matrix."""
        return decompose(self.weight, self.metric, self.whitening)

    @cached_property
    def total(self) -> float:
        """‖R·W·S‖²: the output energy that errors are shares of."""
        return float(self.spectrum.energy.sum())

    def list_candidates(self, step: int, forms: Sequence[Form]) -> list[Candidate]:
        """Every offer cheaper than dense whose ranks are multiples of `step`."""
        offers = {"svd": self._offer_svd, "spatial": self._offer_spatial, "tucker": self._offer_tucker}
        candidates = [candidate for form in forms for candidate in offers[form](step)]
        return [candidate for candidate in candidates if candidate.cost < self.layer.parameters]

    def make_weights(self, factors: Factors) -> tuple[Tensor, ...]:
        """The operators' weights in the order in which they run, float64, norms balanced between neighbours.

        svd: (k, columns), (rows, k); spatial: (k, in, kh, 1), (rows, k, 1, kw); tucker: (r1, in, 1, 1),
        (r2, r1, kh, kw), (rows, r2, 1, 1).
        """
        if factors.form == "svd":
            A, B = truncate(self.spectrum, factors.rank)
            return B, A
        height, width = self.layer.kernel
        if factors.form == "spatial":
            k = factors.rank
            basis = _pad(self._vertical_basis[:k], k)  # (k, in·kh)
            second = self._fit(self._spread_vertical(basis))  # (rows, k·kw)
            A, B = balance(second.reshape(-1, k, width).transpose(1, 2).reshape(-1, k), basis)
            return B.reshape(k, -1, height, 1), A.reshape(self.layer.rows, width, k).transpose(1, 2).unsqueeze(2)
        inner = int(factors.input_rank or 0)
        basis = _pad(self._channel_basis[:inner], inner)  # (r1, in)
        A, core = truncate(self._project(self._spread_channels(basis)), factors.rank)  # (rows, r2), (r2, r1·kh·kw)
        mixed, basis = balance(core.reshape(factors.rank, inner, -1).transpose(1, 2).reshape(-1, inner), basis)
        core = mixed.reshape(factors.rank, height * width, inner).transpose(1, 2)
        return basis[:, :, None, None], core.reshape(factors.rank, inner, height, width), A[:, :, None, None]

    def _offer_svd(self, step: int) -> list[Candidate]:
        tails = _tails(self.spectrum.energy, self.total)
        return [
            Candidate(Factors(rank=k), self.layer.count_factored(k), tails[min(k, len(tails) - 1)])
            for k in range(step, min(self.layer.rows, self.layer.columns) + 1, step)
        ]

    def _offer_spatial(self, step: int) -> list[Candidate]:
        if min(self.layer.kernel) < 2:  # noqa: PLR2004 - a kernel of width 1 is its own spatial SVD
            return []
        width = self.layer.kernel[1]
        held = self._hold(self._spread_vertical(self._vertical_basis))  # energy held by each of the k·kw filters
        offers = []
        for k in range(step, min(self.layer.channels * self.layer.kernel[0], self.layer.rows * width) + 1, step):
            factors = Factors(form="spatial", rank=k)
            lost = max(0.0, 1 - float((held[:, : k * width] ** 2).sum()) / self.total) if self.total else 0.0
            offers.append(Candidate(factors, count_parameters(self.layer, factors), lost))
        return offers

    def _offer_tucker(self, step: int) -> list[Candidate]:
        if max(self.layer.kernel) < 2:  # noqa: PLR2004 - without a kernel it is a matrix
            return []
        size = self.layer.kernel[0] * self.layer.kernel[1]
        held = self._hold(self._spread_channels(self._channel_basis))  # (r, in·kh·kw)
        offers = []
        for inner in _grid(self.layer.channels, step):
            energy = torch.linalg.svdvals(held[:, : inner * size]) ** 2
            base = self.total - float(energy.sum())
            for k in _grid(self.layer.rows, step):
                factors = Factors(form="tucker", rank=k, input_rank=inner)
                lost = (base + float(energy[k:].sum())) / self.total if self.total else 0.0
                offers.append(Candidate(factors, count_parameters(self.layer, factors), max(0.0, lost)))
        return offers

    @cached_property
    def _left(self) -> tuple[Tensor, Tensor]:
        """R (r, rows) with RᵀR = curvature, and its pseudo-inverse (rows, r)."""
        if self.metric.curvature is None:
            eye = torch.eye(self.layer.rows, dtype=torch.float64)
            return eye, eye
        root, inverse = find_root(damp(self.metric.curvature))
        return root.T, inverse

    @cached_property
    def _gram(self) -> Tensor:
        gram = self.metric.gram
        if gram is None or not bool(gram.any()):  # a layer that saw only zeros: no direction matters more
            return torch.eye(self.layer.columns, dtype=torch.float64)
        return gram

    @cached_property
    def _weighted(self) -> Tensor:
        """R·W as (r, in, kh, kw)."""
        return (self._left[0] @ self.weight).reshape(-1, self.layer.channels, *self.layer.kernel)

    @cached_property
    def _vertical_basis(self) -> Tensor:
        """Columns filters (in·kh) of a first spatial operator, best first under the columns' mean Gram: (K, in·kh)."""
        channels, (height, width) = self.layer.channels, self.layer.kernel
        gram = self._gram.reshape(channels, height, width, channels, height, width)
        marginal = torch.einsum("ihwjgw->ihjg", gram).reshape(channels * height, -1)
        matrix = self._weighted.permute(0, 3, 1, 2).reshape(-1, channels * height)
        return decompose_eigen_right(matrix, marginal)

    @cached_property
    def _channel_basis(self) -> Tensor:
        """Mixtures of input channels for Tucker-2's first operator, best first: (R, in)."""
        channels, size = self.layer.channels, self.layer.columns // self.layer.channels
        marginal = torch.einsum("ixjx->ij", self._gram.reshape(channels, size, channels, size))
        matrix = self._weighted.flatten(2).transpose(1, 2).reshape(-1, channels)
        return decompose_eigen_right(matrix, marginal)

    def _spread_vertical(self, basis: Tensor) -> Tensor:
        """The first spatial operator (k, in·kh) as a map from patches: (k·kw, in·kh·kw)."""
        height, width = self.layer.kernel
        filters = basis.reshape(-1, self.layer.channels, height)
        eye = torch.eye(width, dtype=torch.float64)
        return torch.einsum("pih,xw->pxihw", filters, eye).reshape(-1, self.layer.columns)

    def _spread_channels(self, basis: Tensor) -> Tensor:
        """Tucker-2's first operator (r1, in) as a map from patches: (r1·kh·kw, in·kh·kw)."""
        return torch.kron(basis, torch.eye(self.layer.columns // self.layer.channels, dtype=torch.float64))

    def _hold(self, basis: Tensor) -> Tensor:
        """R·W·S projected on the rows of basis·S one after another: the energy a longer basis adds stands apart.

        A Cholesky factor is nested, so one factorisation gives the best fit's error for every shorter basis.
        """
        seen, L = self._see(basis)
        held: Tensor = torch.linalg.solve_triangular(L, (self._left[0] @ self.weight @ seen.T).T, upper=False)
        return held.T

    def _fit(self, basis: Tensor) -> Tensor:
        """The best M (rows, b) for W ≈ M·basis on the inputs: W·G·Tᵀ(T·G·Tᵀ)⁻¹; the curvature does not change it."""
        seen, L = self._see(basis)
        return torch.cholesky_solve(seen @ self.weight.T, L).T

    def _see(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """T·G (b, columns) and the Cholesky factor of T·G·Tᵀ (b, b), damped so that a null space holds nothing."""
        seen = basis @ self._gram
        inner = seen @ basis.T
        damping = _DAMPING * float(inner.diagonal().mean()) + 1e-300
        return seen, torch.linalg.cholesky(inner + damping * torch.eye(len(inner), dtype=inner.dtype))

    def _project(self, basis: Tensor) -> Spectrum:
        """The spectrum of the best fit on a basis, under the metric that the basis' outputs have."""
        metric = Metric(gram=basis @ self._gram @ basis.T, curvature=self.metric.curvature)
        return decompose(self._fit(basis), metric, "eigen")


def decompose_eigen_right(matrix: Tensor, gram: Tensor) -> Tensor:
    """Right factors of the whitened SVD: the directions (r, n) of the inputs in order of the energy they carry."""
    return decompose(matrix, Metric(gram=gram), "eigen").right


def list_smallest(layer: Layer, step: int, forms: Sequence[Form]) -> list[Factors | None]:
    """The lowest rank of every form that the layer can take, and dense (None)."""
    height, width = layer.kernel
    outer, inner = _grid(layer.rows, step), _grid(layer.channels, step)
    offers: dict[Form, Factors | None] = {
        "svd": Factors(rank=step) if step <= min(layer.rows, layer.columns) else None,
        "spatial": Factors(form="spatial", rank=step)
        if min(height, width) > 1 and step <= min(layer.channels * height, layer.rows * width)
        else None,
        "tucker": Factors(form="tucker", rank=outer[0], input_rank=inner[0])
        if max(height, width) > 1 and outer and inner
        else None,
    }
    return [None, *(offers[form] for form in forms)]


def list_ladder(layer: Layer, step: int, form: Form) -> list[Factors]:
    """A form's ranks with fewer parameters than dense, rising; Tucker-2's two widths rise together, in proportion."""
    height, width = layer.kernel
    inner, share = _grid(layer.channels, step), layer.channels / layer.rows
    rungs: dict[Form, list[Factors]] = {
        "svd": [Factors(rank=k) for k in range(step, min(layer.rows, layer.columns) + 1, step)],
        "spatial": [
            Factors(form="spatial", rank=k)
            for k in range(step, min(layer.channels * height, layer.rows * width) + 1, step)
            if min(height, width) > 1
        ],
        "tucker": [
            Factors(form="tucker", rank=k, input_rank=_find_nearest(inner, k * share))
            for k in _grid(layer.rows, step)
            if max(height, width) > 1 and inner
        ],
    }
    return [one for one in rungs[form] if count_parameters(layer, one) < layer.parameters]


def compose(layer: Layer, weights: Sequence[Tensor]) -> Tensor:
    """Multiply a chain of operators out to the (rows, columns) matrix that it computes."""
    if len(weights) == 2 and weights[0].ndim == 2:  # noqa: PLR2004 - a pair of matrices
        return weights[1] @ weights[0]
    if len(weights) == 2:  # noqa: PLR2004 - a spatial pair
        return torch.einsum("okw,kih->oihw", weights[1][:, :, 0], weights[0][..., 0]).reshape(layer.rows, -1)
    first, core, last = weights
    return torch.einsum("or,rphw,pi->oihw", last[..., 0, 0], core, first[..., 0, 0]).reshape(layer.rows, -1)


def keep_efficient(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Only candidates that no cheaper or equally cheap one beats, in order of cost."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (one.cost, one.error)):
        if not kept or candidate.error < kept[-1].error:
            kept.append(candidate)
    return tuple(kept)


def _tails(energy: Tensor, total: float) -> list[float]:
    """Σ_{j≥k} σ_j² / Σ σ_j² for k = 0 … r."""
    if total == 0:
        return [0.0] * (len(energy) + 1)
    sums = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    return [float(value) / total for value in sums]


def _grid(limit: int, step: int) -> range:
    """Multiples of `step` up to the limit, thinned to _TUCKER_GRID of them."""
    coarse = step * max(1, -(-limit // (step * _TUCKER_GRID)))
    return range(coarse, limit + 1, coarse)


def _find_nearest(values: range, wanted: float) -> int:
    return min(values, key=lambda value: abs(value - wanted))


def _pad(basis: Tensor, count: int) -> Tensor:
    """Zero rows where the inputs span fewer directions than asked for."""
    return torch.cat([basis, basis.new_zeros(count - len(basis), basis.shape[1])])
