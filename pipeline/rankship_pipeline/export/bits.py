"""Gives a part's file weights of fewer bits, in each format's own way, and reads back that it has them."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from torch.export import ExportedProgram

from rankship_pipeline.export import keep_stdout_clean
from rankship_pipeline.export.artifact import Part
from rankship_pipeline.export.dynamic import simulate_activations
from rankship_pipeline.export.eight_bits import list_weights
from rankship_pipeline.export.rounded_weight import RoundedWeight, check_weights
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.recipe.precision import Activations

_ROOM = "rankship_pipeline.export"
_WRITERS: dict[Format, str] = {"onnx": f"{_ROOM}.onnx_bits", "tflite": f"{_ROOM}.tflite_bits"}
_READERS: dict[Format, str] = {
    "onnx": f"{_ROOM}.onnx_read",
    "tflite": f"{_ROOM}.tflite_bits",
    "executorch": f"{_ROOM}.executorch_bits",
}


class Writer(Protocol):
    """A format that stores weights of fewer bits in a file of float32."""

    def quantise_file(
        self, source: Path, target: Path, weights: Sequence[RoundedWeight], activations: Activations
    ) -> tuple[RoundedWeight, ...]:
        """Write the file with these weights in fewer bits; those that it then holds."""


class Reader(Protocol):
    """A format whose weights of fewer bits are read back."""

    def read_weights(self, path: Path) -> tuple[RoundedWeight, ...]:
        """Every weight of fewer bits in a file."""


def fit_format(part: Part, format_: Format) -> Part:
    """The part as one format exports and proves it: activations are rounded as that format's runtime does."""
    if not part.weights:
        return part
    reference = part.module
    if part.activations == "dynamic":
        reference = simulate_activations(part.module, part.weights, format_)
    module = part.module
    if format_ == "tflite":
        from rankship_pipeline.export.tflite_bits import mark_inputs

        module = mark_inputs(part.module, part.weights)
    elif format_ == "executorch":
        from rankship_pipeline.export.executorch_bits import quantise_module

        module = quantise_module(part.module, part.weights)
    return replace(part, module=module, reference=reference, plain=part.module)


def store_bits(part: Part, graph: ExportedProgram | None, format_: Format, path: Path) -> list[str]:
    """Store the part's weights of fewer bits in its file, where its graph did not, and check that they are there.

    The graph is that of a part that computes in 8 bits itself. Returns the names of those weights that the file holds
    in float32, as the format's converter made other numbers of them.
    BuildError names each that is not stored as it was rounded.
    """
    if not part.weights:
        if graph is not None:
            check_stored(list_weights(graph), part, format_, path)
        return []
    weights = part.weights
    if format_ in _WRITERS:
        writer = cast("Writer", importlib.import_module(_WRITERS[format_]))
        with keep_stdout_clean():
            weights = writer.quantise_file(path, path, part.weights, part.activations)
    check_stored(weights, part, format_, path)
    held = {one.name for one in weights}
    return [one.name for one in part.weights if one.name not in held]


def check_stored(weights: Sequence[RoundedWeight], part: Part, format_: Format, path: Path) -> None:
    """Check bit by bit that a file holds these weights; BuildError names each that it does not."""
    reader = cast("Reader", importlib.import_module(_READERS[format_]))
    with keep_stdout_clean():
        found = reader.read_weights(path)
    check_weights(weights, found, where=f"{part.title} {format_}")
