"""The table of what each format runs of rounded layers: what a choice of bits may offer.

Every cell was tried: benchmarks/baselines/capabilities.json has its error, size and time, and a test holds the table
against it. ExecuTorch builds linear layers with weights of fewer bits and float32 activations, and computes nonsense.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.models import layers
from rankship_pipeline.quantise.sizes import Offered
from rankship_pipeline.recipe.precision import Activations, Computed

Kind = Literal["linear", "convolution", "embedding"]

# With "dynamic" and "float32" activations the weights of convolutions and embeddings are rounded alone.
RUNS: dict[tuple[Format, Kind, Activations], tuple[Precision, ...]] = {
    ("onnx", "linear", "static"): ("int8",),
    ("onnx", "linear", "dynamic"): ("int8", "int4"),
    ("onnx", "linear", "float32"): ("int8", "int4"),
    ("onnx", "convolution", "static"): ("int8",),
    ("onnx", "convolution", "dynamic"): ("int8", "int4"),
    ("onnx", "convolution", "float32"): ("int8", "int4"),
    ("onnx", "embedding", "dynamic"): ("int8", "int4"),
    ("onnx", "embedding", "float32"): ("int8", "int4"),
    ("tflite", "linear", "static"): ("int8",),
    ("tflite", "linear", "dynamic"): ("int8", "int4"),
    ("tflite", "linear", "float32"): ("int8",),
    ("tflite", "convolution", "static"): ("int8",),
    ("tflite", "convolution", "dynamic"): ("int8",),
    ("tflite", "convolution", "float32"): ("int8",),
    ("tflite", "embedding", "dynamic"): ("int8", "int4"),
    ("tflite", "embedding", "float32"): ("int8",),
    ("executorch", "linear", "static"): ("int8",),
    ("executorch", "linear", "dynamic"): ("int8", "int4"),
    ("executorch", "convolution", "static"): ("int8",),
    ("executorch", "embedding", "dynamic"): ("int8", "int4"),
    ("executorch", "embedding", "float32"): ("int8", "int4"),
}


def list_offered(formats: Sequence[Format], activations: Computed) -> Offered:
    """The types that every one of these formats runs each kind of layer in."""
    kinds: dict[Precision, frozenset[layers.Kind]] = {"float32": frozenset(get_args(layers.Kind))}
    for precision in ("int8", "int4"):
        kinds[precision] = frozenset(
            kind
            for kind in get_args(Kind)
            if all(precision in RUNS.get((one, kind, activations), ()) for one in formats)
        )
    return Offered(kinds, blocked=True)
