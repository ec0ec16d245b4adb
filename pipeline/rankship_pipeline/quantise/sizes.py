"""Which types a layer's weights may have, and the bytes that they take with their scales."""

from collections.abc import Mapping

from rankship_pipeline.factors.forms import FORMS
from rankship_pipeline.factors.operators import Operator
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.models.layers import Kind, Layer
from rankship_pipeline.quantise.grid import BITS, BLOCK, find_block

Offered = Mapping[Precision, frozenset[Kind]]

_SCALE_BYTES = 4  # float32
# The layers whose weights runtimes run in a type; int4 needs operators whose columns are multiples of BLOCK.
OFFERED: Offered = {
    "float32": frozenset({"linear", "convolution", "transposed convolution", "embedding"}),
    "int8": frozenset({"linear", "convolution", "embedding"}),
    "int4": frozenset({"linear"}),
}
# What can be simulated in torch, where 4 bits may have one scale for a whole row.
SIMULATED: Offered = {**OFFERED, "int4": frozenset({"linear", "convolution", "embedding"})}


def is_offered(layer: Layer, stored: Stored, offered: Offered = OFFERED) -> bool:
    """Whether every module that computes with the layer's weight can be stored so."""
    if any(use.kind not in offered.get(stored.weights, ()) for use in layer.uses):
        return False
    blocked = offered is OFFERED and stored.weights == "int4"
    return not blocked or all(one.columns % BLOCK == 0 for one in list_matrices(layer, stored.factors))


def count_bytes(layer: Layer, stored: Stored) -> int:
    """The bytes of a layer's weights stored so, with a float32 scale for every row or block that is rounded."""
    total = 0
    for at, one in enumerate(list_matrices(layer, stored.factors)):
        total += -(-one.elements * BITS[stored.weights] // 8)
        if stored.weights in {"int8", "int4"}:
            kind: Kind = "linear" if layer.kind == "embedding" and at else layer.kind
            block = find_block(kind, one.columns, stored.weights)
            total += _SCALE_BYTES * one.rows * (1 if block is None else one.columns // block)
    return total


def list_matrices(layer: Layer, factors: Factors | None) -> list[Operator]:
    """The stored matrices, each with the rows that have scales of their own: an embedding's are its tokens."""
    dense = (Operator(layer.rows, layer.columns),)
    first, *others = dense if factors is None else FORMS[factors.form].list_operators(layer, factors)
    return [Operator(first.columns, first.rows) if layer.kind == "embedding" else first, *others]
