"""The types in which a recipe's compressed model stores its weights and computes its activations."""

from typing import Literal

from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record

Computed = Literal["float32", "static", "dynamic"]
Activations = Literal["auto", Computed]

BLOCK = 32  # columns that share a scale where runtimes run 4 bits
TYPES: tuple[Precision, ...] = ("float32", "int8", "int4")  # that weights may be asked to have


@record
class PrecisionChoice:
    """The types that the compressed model's weights may have, and how its activations are computed.

    With a budget of bytes (`size_bytes`), every layer takes one of `weights`, chosen together with its ranks. With any
    other budget the ranks are chosen alone, and there is one file for each of `weights`.

    Keys:
        weights: the types on offer: "float32", "int8", "int4"
        activations: how 8-bit layers compute. "static": in 8 bits, with ranges from calibration data; "dynamic": in 8
            bits, with each input's own ranges; "float32": only the weights are rounded; "auto": "static" for models
            of convolutions (half of the layers or more), "dynamic" for others
        formats: the formats that must all run a type for it to be on offer; left out, those that are exported
    """

    weights: tuple[Precision, ...] = ("float32",)
    activations: Activations = "auto"
    formats: tuple[Format, ...] = ()
