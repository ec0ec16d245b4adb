"""Writes language models to files that generate, with a cache of keys and values: one module per format.

A format's module has two functions:

    trace_decoder(model, shape) -> dict[str, ExportedProgram]    its graphs by name, the first with all operators
    write_graphs(graphs, path, shape, generation) -> None        the file of them

Where each format has its cache, and what its inputs are called, is said in its module: it is what the format's own
runners of language models expect.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from rankship_pipeline.export import Expected, keep_stdout_clean
from rankship_pipeline.export.collector import pause_collector
from rankship_pipeline.foundation.errors import InputError, RankshipError, UnsupportedOp
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.generation import Generation

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from rankship_pipeline.export.decoders.cached import Shape

_ROOM = "rankship_pipeline.export.decoders"
WRITERS: dict[Format, str] = {
    "onnx": f"{_ROOM}.onnx",
    "tflite": f"{_ROOM}.tflite",
    "executorch": f"{_ROOM}.executorch",
}


class Writer(Protocol):
    """The functions of a format's module."""

    def trace_decoder(self, model: "nn.Module", shape: "Shape") -> "dict[str, ExportedProgram]":
        """The graphs of a file."""

    def write_graphs(
        self, graphs: "dict[str, ExportedProgram]", path: Path, shape: "Shape", generation: Generation
    ) -> None:
        """Write the file."""


def write_decoder(module: "nn.Module", format_: Format, path: Path, generation: Generation) -> Expected:
    """Write a language model of transformers to one file that generates; the operators that must be in it.

    The model is in evaluation mode and float32, perhaps wrapped (models/huggingface.py); some of its layers may be
    chains. InputError or UnsupportedOp says what of the model no such file can have.
    """
    from rankship_pipeline.export.decoders.cached import attend_by_groups, find_model, read_shape
    from rankship_pipeline.export.graph import expect_operators

    model = find_model(module)
    shape = read_shape(model, generation)
    writer = _load_writer(format_)
    try:
        with keep_stdout_clean(), pause_collector(), attend_by_groups(model):
            graphs = writer.trace_decoder(model, shape)
            writer.write_graphs(graphs, path, shape, generation)
    except RankshipError:
        raise
    except Exception as failure:  # the model's code, the tracer and converters raise errors of any type
        raise UnsupportedOp(
            f"{format_} cannot express the model with a cache: {type(failure).__name__}: {failure}",
            hint="export it at a fixed length, or leave the format out",
        ) from failure
    return expect_operators(next(iter(graphs.values())))


def _load_writer(format_: Format) -> Writer:
    try:
        return cast("Writer", importlib.import_module(WRITERS[format_]))
    except ImportError as failure:
        raise InputError(
            f"cannot export {format_}: {failure}",
            hint=f"pip install '{FACTS[format_].extra}', or leave {format_} out of export.formats",
        ) from failure
