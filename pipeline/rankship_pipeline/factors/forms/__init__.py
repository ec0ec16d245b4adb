"""The forms in which a layer may be stored: one module per form, and the table of them.

A form's module gives its cost and its error at every rank, and makes its weights and its torch modules; `Form` lists
the functions that it must define. The code that is common to all forms is here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor, nn

from rankship_pipeline.factors.decompose import balance
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import spatial, svd, tucker, width
from rankship_pipeline.factors.operators import Operator
from rankship_pipeline.foundation import records
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Factorable, Layer


class Form(Protocol):
    """The functions that a module of this folder defines; svd.py is the shortest."""

    def list_factors(self, layer: Layer, step: int, /) -> Iterable[Factors]:
        """All factors that the layer can have in this form, smallest first, with ranks that are multiples of `step`."""
        ...

    def list_operators(self, layer: Layer, factors: Factors, /) -> tuple[Operator, ...]:
        """The chain's operators, in the order in which they run."""
        ...

    def measure_errors(self, taken: Decomposition, step: int, /) -> Iterable[tuple[Factors, float]]:
        """The share of the output energy that each of `list_factors` loses."""
        ...

    def make_weights(self, taken: Decomposition, factors: Factors, /) -> tuple[Tensor, ...]:
        """The operators' weights, float64, norms balanced between neighbours."""
        ...

    def compose(self, layer: Layer, weights: Sequence[Tensor], /) -> Tensor:
        """The matrix (rows, columns) that a chain with these weights computes."""
        ...

    def make_modules(self, module: Factorable, factors: Factors, /) -> list[nn.Module]:
        """The operators that replace the module, with weights unset; the last has a bias if the module has one."""
        ...


FORMS: Mapping[records.Form, Form] = {
    "svd": svd,
    "spatial": spatial,
    "tucker": tucker,
    "width": width,
}


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer, its cost, and the share of the layer's output energy that it loses.

    The cost is in parameters until ranks.stats.gather_stats sets it in another unit.
    """

    factors: Factors
    cost: int
    error: float


def count_parameters(layer: Layer, factors: Factors | None) -> int:
    """The number of weights of a layer stored as `factors`; dense for None."""
    if factors is None:
        return layer.parameters
    return sum(one.elements for one in FORMS[factors.form].list_operators(layer, factors))


def list_operators(layer: Layer, factors: Factors | None) -> tuple[Operator, ...]:
    """The operators of a layer stored as `factors`, dense for None; an embedding's lookup is not one.

    Those of the layers that are tied to it follow.
    """
    return tuple(operator for use in layer.uses for operator in _list_own(use, factors))


def _list_own(layer: Layer, factors: Factors | None) -> tuple[Operator, ...]:
    dense = (Operator(layer.rows, layer.columns),)
    chained = dense if factors is None else FORMS[factors.form].list_operators(layer, factors)
    return chained[1 if layer.kind == "embedding" else 0 :]


def list_candidates(taken: Decomposition, step: int, forms: Sequence[records.Form]) -> list[Candidate]:
    """Every candidate with fewer parameters than dense whose ranks are multiples of `step`."""
    known = forms if taken.outer is None else [form for form in forms if form == "svd"]
    offers = (offer for form in known for offer in FORMS[form].measure_errors(taken, step))
    priced = (Candidate(factors, count_parameters(taken.layer, factors), error) for factors, error in offers)
    return [one for one in priced if one.cost < taken.layer.parameters]


class Rated(Protocol):
    """Anything with a cost and an error."""

    @property
    def cost(self) -> int:
        """Its cost, in any unit."""
        ...

    @property
    def error(self) -> float:
        """What it loses."""
        ...


R = TypeVar("R", bound=Rated)


def keep_efficient(candidates: Iterable[R]) -> tuple[R, ...]:
    """The candidates for which no other of the same or lower cost has a smaller error, in order of cost."""
    kept: list[R] = []
    for candidate in sorted(candidates, key=lambda one: (one.cost, one.error)):
        if not kept or candidate.error < kept[-1].error:
            kept.append(candidate)
    return tuple(kept)


def list_smallest(
    layer: Layer, step: int, forms: Sequence[records.Form], fits: Callable[[Factors], bool] = lambda _factors: True
) -> list[Factors | None]:
    """Dense (None), and the lowest rank that fits in every form that the layer can have."""
    found = (next((one for one in FORMS[form].list_factors(layer, step) if fits(one)), None) for form in forms)
    return [None, *(one for one in found if one is not None)]


def list_ladder(layer: Layer, step: int, form: records.Form) -> list[Factors]:
    """A form's ranks with fewer parameters than dense, ascending; two widths rise together, in proportion."""
    rungs: dict[int, list[Factors]] = {}
    for one in FORMS[form].list_factors(layer, step):
        rungs.setdefault(one.rank, []).append(one)
    share = layer.channels / layer.rows
    ladder = [min(some, key=lambda one: abs((one.input_rank or 0) - one.rank * share)) for some in rungs.values()]
    return [one for one in ladder if count_parameters(layer, one) < layer.parameters]


def make_weights(taken: Decomposition, factors: Factors) -> tuple[Tensor, ...]:
    """The operators' weights in the order in which they run, float64, norms balanced between neighbours."""
    first, *others = FORMS[factors.form].make_weights(taken, factors)
    if taken.outer is None:
        return first, *others
    A, B = balance(taken.restore_outputs(others[0]), taken.restore_inputs(first))
    return B, A


def approximate(taken: Decomposition, factors: Factors) -> Tensor:
    """The matrix in the place of `taken.weight` that a layer stored as `factors` computes."""
    return compose(taken.layer, factors, FORMS[factors.form].make_weights(taken, factors))


def compose(layer: Layer, factors: Factors, weights: Sequence[Tensor]) -> Tensor:
    """Multiply a chain of operators out to the (rows, columns) matrix that it computes."""
    return FORMS[factors.form].compose(layer, weights)
