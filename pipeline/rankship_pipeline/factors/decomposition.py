"""One layer's weight decomposed under its metric: the matrix algebra that all forms share.

The metric (see decompose.Metric) makes the errors of all forms comparable at equal cost. The SVD is its optimum. For a
form with another first operator, that operator's basis is chosen from marginals of the Gram, and the operators after it
are the exact optimum for that basis.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from rankship_pipeline.factors.decompose import Metric, Spectrum, decompose
from rankship_pipeline.factors.eigen import find_damped_cholesky
from rankship_pipeline.models.layers import Layer

# Added to the Gram of a basis as a share of its diagonal, above rounding; that share of the energy is lost.
_DAMPING = 1e-10
# A missing share of the energy below this is rounding.
_ROUNDING = 1e-9
# A decomposition's properties that are matrices.
_COMPUTED = ("gram", "weighted", "_weighted", "_root")


@dataclass(frozen=True)
class Decomposition:
    """One layer's weight (rows, columns), float64, decomposed under one metric.

    A layer whose metric is one of a reduced side has a square `weight` as if that side were as short as the other, and
    its own as `outer` (see decompose.reduce_side).
    """

    layer: Layer
    weight: Tensor
    metric: Metric
    whitening: str
    outer: Tensor | None = field(default=None, compare=False)
    _found: dict[object, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def spectrum(self) -> Spectrum:
        """The whitened SVD of the matrix."""
        return decompose(self.weight, self.metric, self.whitening)

    @cached_property
    def total(self) -> float:
        """‖R·W·S‖² of the dense layer: the output energy; errors are shares of it."""
        if self.metric.gram is None:
            return float(self.spectrum.energy.sum())
        return self.measure(self.weight, self.gram)

    @cached_property
    def missed(self) -> float:
        """The part of `total` that no rank of the spectrum holds, for directions that count as zero in the Gram."""
        missed = self.total - float(self.spectrum.energy.sum())
        return missed if missed > _ROUNDING * self.total else 0.0

    def measure(self, change: Tensor, gram: Tensor) -> float:
        """tr(H·Δ·G·Δᵀ): the size of a change of the weight (rows, columns) on inputs with this Gram."""
        moved = self._root.T @ change
        return float(((moved * gram if gram.ndim == 1 else moved @ gram) * moved).sum())

    @cached_property
    def gram(self) -> Tensor:
        """The inputs' Gram (columns, columns); the identity without one."""
        gram = self.metric.gram
        if gram is None or not bool(gram.any()):  # a layer whose inputs were all zero: all directions count the same
            return torch.eye(self.weight.shape[1], dtype=torch.float64)
        return gram

    @cached_property
    def weighted(self) -> Tensor:
        """R·W as (r, in, kh, kw) with RᵀR = curvature."""
        return self._weighted.reshape(-1, self.layer.channels, *self.layer.kernel)

    @cached_property
    def _weighted(self) -> Tensor:
        return self._root.T @ self.weight

    @cached_property
    def _root(self) -> Tensor:
        """Rᵀ (rows, r)."""
        root = self.metric.root
        return torch.eye(len(self.weight), dtype=torch.float64) if root is None else root

    def restore(self, matrix: Tensor) -> Tensor:
        """A matrix (rows, columns) in the place of the layer's weight, from one in the place of `weight`."""
        return self.restore_outputs(self.restore_inputs(matrix))

    def restore_inputs(self, matrix: Tensor) -> Tensor:
        """A matrix (·, columns) on the layer's inputs, from one on `weight`'s: of a wide layer M·Q with Q = L⁻¹·W."""
        L, W = self.metric.inner, self.outer
        if L is None or W is None or len(W) > W.shape[1]:
            return matrix
        inner: Tensor = torch.linalg.solve_triangular(L, matrix, upper=False, left=False)
        return (inner.to(W.dtype) @ W).to(matrix.dtype)

    def restore_outputs(self, matrix: Tensor) -> Tensor:
        """A matrix (rows, ·) with the layer's outputs, from one with `weight`'s: of a tall layer Q·M with Q = W·L⁻¹."""
        L, W = self.metric.inner, self.outer
        if L is None or W is None or len(W) < W.shape[1]:
            return matrix
        inner: Tensor = torch.linalg.solve_triangular(L, matrix, upper=True)
        return (W @ inner.to(W.dtype)).to(matrix.dtype)

    def open_inputs(self) -> "Decomposition":
        """The same, but for a Gram of the layer's own inputs (columns, columns), which is to be set."""
        if self.outer is None or len(self.outer) > self.outer.shape[1]:
            return self
        metric = replace(self.metric, inner=None)
        return replace(self, weight=self.outer.double(), metric=metric, outer=None)

    @property
    def held_bytes(self) -> int:
        """The memory of the weight, the metric and what was computed from them so far."""
        spectrum: Spectrum | None = vars(self).get("spectrum")
        found = [self.weight, self.outer, *self._found.values(), *(vars(self).get(name) for name in _COMPUTED)]
        found += [*self.metric.list_held(), *(() if spectrum is None else (spectrum.U, spectrum.right))]
        return sum({one.data_ptr(): one.nbytes for one in found if one is not None}.values())

    def remember(self, find: Callable[["Decomposition"], Tensor]) -> Tensor:
        """The result of `find(self)`, such as a form's basis, computed once."""
        if find not in self._found:
            self._found[find] = find(self)
        return self._found[find]

    def hold(self, basis: Tensor) -> Tensor:
        """R·W·S projected on the rows of T·S one after another: each column holds the energy that its row adds.

        T = basis ⊗ I, the basis (b, n) applied at each of the columns / n places, has b·columns / n rows. A Cholesky
        factor is nested, so one factorisation gives the best fit's error for every shorter basis.
        """
        seen, _, L = self._see(basis)
        held: Tensor = torch.linalg.solve_triangular(L, (self._weighted @ seen.T).T, upper=False)
        return held.T

    def fit(self, basis: Tensor) -> Tensor:
        """The best M for W ≈ M·T on the inputs: W·G·Tᵀ(T·G·Tᵀ)⁻¹; the curvature does not change it."""
        seen, _, L = self._see(basis)
        return self._solve(seen, L)

    def project(self, basis: Tensor) -> Spectrum:
        """The spectrum of the best fit on a basis, under the metric of the basis's outputs."""
        seen, inner, L = self._see(basis)
        return decompose(self._solve(seen, L), replace(self.metric, gram=inner), "swift")

    def _solve(self, seen: Tensor, L: Tensor) -> Tensor:
        return torch.cholesky_solve(seen @ self.weight.T, L).T

    def _see(self, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T·G, T·G·Tᵀ, and the latter's Cholesky factor, damped so that a null space holds no energy."""
        seen = _spread(basis, self.gram)
        inner = _spread(basis, seen.T)
        return seen, inner, find_damped_cholesky(inner, _DAMPING)


def _spread(basis: Tensor, matrix: Tensor) -> Tensor:
    """(basis ⊗ I)·matrix, without the zeros of the Kronecker product."""
    return (basis @ matrix.reshape(basis.shape[1], -1)).reshape(-1, matrix.shape[1])


def find_directions(matrix: Tensor, gram: Tensor) -> Tensor:
    """Right factors of the whitened SVD: the directions (r, n) of the inputs in order of the energy they carry."""
    return decompose(matrix, Metric(gram=gram), "swift").right
