"""Which types a layer's weights may have, and the bytes that they take with their scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankship_pipeline.factors.forms import FORMS
from rankship_pipeline.factors.operators import Operator
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.models.layers import Kind, Layer
from rankship_pipeline.quantise.grid import BITS, find_block
from rankship_pipeline.recipe.precision import BLOCK, Activations, Computed

_SCALE_BYTES = 4  # float32


@dataclass(frozen=True)
class Offered:
    """The kinds of operators whose weights may have a type.

    With `blocked`, int4 has blocks of BLOCK columns, so that an operator's columns are a multiple of that; a
    convolution has one scale a row.
    """

    kinds: Mapping[Precision, frozenset[Kind]]
    blocked: bool

    def allows(self, kind: Kind, columns: int, precision: Precision) -> bool:
        """Whether an operator of so many columns may have its weights in this type."""
        fits = not self.blocked or precision != "int4" or kind == "convolution" or columns % BLOCK == 0
        return fits and kind in self.kinds.get(precision, ())


_ALL: frozenset[Kind] = frozenset({"linear", "convolution", "transposed convolution", "embedding"})
# What one format or another runs; export/capabilities.py has what each does.
OFFERED = Offered(
    {"float32": _ALL, "int8": frozenset({"linear", "convolution", "embedding"}), "int4": frozenset({"linear"})},
    blocked=True,
)
# What torch can simulate: 4 bits may have one scale for a whole row.
SIMULATED = Offered({"float32": _ALL, "int8": OFFERED.kinds["int8"], "int4": OFFERED.kinds["int8"]}, blocked=False)


def choose_activations(asked: Activations, layers: Sequence[Layer]) -> Computed:
    """How activations are computed; "auto": static where half of the layers or more are convolutions, else dynamic."""
    if asked != "auto":
        return asked
    convolutions = sum(1 for layer in layers if layer.kind == "convolution")
    return "static" if convolutions and 2 * convolutions >= len(layers) else "dynamic"


def is_offered(layer: Layer, stored: Stored, offered: Offered = OFFERED) -> bool:
    """Whether every operator of a layer stored so, and of what is tied to it, may have its type."""
    return all(
        offered.allows(find_operator_kind(use, at), one.columns, stored.weights)
        for use in layer.uses
        for at, one in enumerate(list_matrices(use, stored.factors))
    )


def count_bytes(layer: Layer, stored: Stored) -> int:
    """The bytes of a layer's weights stored so, with a float32 scale for every row or block that is rounded."""
    total = 0
    for at, one in enumerate(list_matrices(layer, stored.factors)):
        total += -(-one.elements * BITS[stored.weights] // 8)
        if stored.weights in {"int8", "int4"}:
            block = find_block(find_operator_kind(layer, at), one.columns, stored.weights)
            total += _SCALE_BYTES * one.rows * (1 if block is None else one.columns // block)
    return total


def find_operator_kind(layer: Layer, at: int) -> Kind:
    """The kind of the operator at this place of a layer's chain."""
    return "linear" if layer.kind == "embedding" and at else layer.kind


def list_matrices(layer: Layer, factors: Factors | None) -> list[Operator]:
    """The stored matrices, each with the rows that have scales of their own: an embedding's are its tokens."""
    dense = (Operator(layer.rows, layer.columns),)
    first, *others = dense if factors is None else FORMS[factors.form].list_operators(layer, factors)
    return [Operator(first.columns, first.rows) if layer.kind == "embedding" else first, *others]
