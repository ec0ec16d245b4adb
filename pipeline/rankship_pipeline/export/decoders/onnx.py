"""Writes a decoder to one ONNX file whose cache is inputs and outputs, under the names of onnxruntime-genai."""

from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rankship_pipeline.export import check_size
from rankship_pipeline.export.decoders.cached import HIDDEN, Shape, run_cached, see_earlier
from rankship_pipeline.export.frozen_trace import trace_frozen
from rankship_pipeline.export.graph import order_rows
from rankship_pipeline.export.onnx import OPSET, strip_metadata
from rankship_pipeline.foundation.errors import UnsupportedOp
from rankship_pipeline.foundation.generation import Generation

_EXAMPLE = 3, 4  # tokens, and places in the cache before them: lengths that nothing else has


class _Growing(nn.Module):
    """The model with a cache that grows: keys and values of earlier places in, those of all places out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        present: dict[int, tuple[Tensor, Tensor]] = {}

        def update(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            present[layer] = torch.cat([past[2 * layer], keys], 2), torch.cat([past[2 * layer + 1], values], 2)
            return present[layer]

        places = torch.arange(input_ids.shape[1]) + past[0].shape[2]
        seen = see_earlier(places, torch.arange(attention_mask.shape[1]))
        seen = seen + torch.where(attention_mask == 0, HIDDEN, 0.0)
        logits = run_cached(self.model, input_ids, places, seen, update)
        return logits, *(one for layer in sorted(present) for one in present[layer])


def trace_decoder(model: nn.Module, shape: Shape) -> dict[str, ExportedProgram]:
    """The one graph, of any number of tokens and of earlier places."""
    n, before = _EXAMPLE
    past = tuple(torch.zeros(1, shape.heads, before, shape.size) for _ in range(2 * shape.layers))
    example = (torch.zeros(1, n, dtype=torch.int64), torch.ones(1, n + before, dtype=torch.int64), *past)
    tokens, earlier = Dim("tokens", min=1, max=shape.context), Dim("earlier", min=0, max=shape.context)
    shapes = {"input_ids": {1: tokens}, "attention_mask": {1: Dim.DYNAMIC}, "past": tuple({2: earlier} for _ in past)}
    return {"decoder": trace_frozen(_Growing(order_rows(model)).eval(), example, shapes)}


def write_graphs(graphs: dict[str, ExportedProgram], path: Path, shape: Shape, _generation: Generation) -> None:
    """Write the file; it says how many tokens its model takes, as nothing in its inputs does."""
    (graph,) = graphs.values()
    check_size(graph.state_dict.values(), "onnx")
    program = torch.onnx.export(graph, dynamo=True, opset_version=OPSET, verbose=False)
    if program is None:
        raise UnsupportedOp("torch.onnx.export returned no program")
    inputs, outputs = program.model.graph.inputs, program.model.graph.outputs
    for value, name in zip(
        inputs, ("input_ids", "attention_mask", *_name_cache("past_key_values", shape)), strict=True
    ):
        value.name = name
    for value, name in zip(outputs, ("logits", *_name_cache("present", shape)), strict=True):
        value.name = name
    model = program.model_proto
    strip_metadata(model)
    helper.set_model_props(model, {"context": str(shape.context)})
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def _name_cache(prefix: str, shape: Shape) -> Iterator[str]:
    for layer in range(shape.layers):
        yield f"{prefix}.{layer}.key"
        yield f"{prefix}.{layer}.value"
