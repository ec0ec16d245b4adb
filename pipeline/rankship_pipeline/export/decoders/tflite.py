"""Writes a decoder to one TFLite file with signatures `prefill_N` and `decode`, as litert-torch's own exporter does.

Their inputs are `tokens` (1, N), `input_pos` (N), `mask` (1, 1, N, context), what is added to scores, and the cache:
`kv_cache_k_0` (1, heads, context, size), `kv_cache_v_0` (1, heads, size, context), and so on. All give the cache back;
`decode`, of one token, gives its `logits` too.
"""

from pathlib import Path
from typing import Any

import litert_torch
import torch
from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice
from torch import Tensor, nn
from torch.export import ExportedProgram

from rankship_pipeline.export import check_size
from rankship_pipeline.export.decoders.cached import Shape, run_cached
from rankship_pipeline.export.decoders.runs import list_prefills
from rankship_pipeline.export.frozen_trace import trace_frozen
from rankship_pipeline.export.graph import order_rows
from rankship_pipeline.foundation.generation import Generation


class _Static(nn.Module):
    """The model with a cache of `context` places, in and out."""

    def __init__(self, model: nn.Module, *, answers: bool) -> None:
        super().__init__()
        self.model = model
        self.answers = answers

    def forward(self, tokens: Tensor, input_pos: Tensor, mask: Tensor, **cache: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        start, zero = input_pos[0], torch.zeros((), dtype=input_pos.dtype)

        def update(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            k_name, v_name = f"kv_cache_k_{layer}", f"kv_cache_v_{layer}"
            k = dynamic_update_slice(cache[k_name], keys, [zero, zero, start, zero])
            v = dynamic_update_slice(cache[v_name], values.transpose(2, 3), [zero, zero, zero, start])
            found[k_name], found[v_name] = k, v
            return k, v.transpose(2, 3)

        logits = run_cached(self.model, tokens, input_pos, mask[0, 0], update)
        return found | {"logits": logits} if self.answers else found


def trace_decoder(model: nn.Module, shape: Shape) -> dict[str, ExportedProgram]:
    """A graph for each signature, first the one with all operators."""
    ordered = order_rows(model)
    lengths = {"decode": 1} | {f"prefill_{n}": n for n in list_prefills(shape.context)}
    return {name: _trace(_Static(ordered, answers=name == "decode").eval(), n, shape) for name, n in lengths.items()}


def _trace(module: nn.Module, n: int, shape: Shape) -> ExportedProgram:
    tokens, mask = torch.zeros(1, n, dtype=torch.int32), torch.zeros(1, 1, n, shape.context)
    named = {"tokens": tokens, "input_pos": torch.arange(n, dtype=torch.int32), "mask": mask}
    for layer in range(shape.layers):
        named[f"kv_cache_k_{layer}"] = torch.zeros(1, shape.heads, shape.context, shape.size)
        named[f"kv_cache_v_{layer}"] = torch.zeros(1, shape.heads, shape.size, shape.context)
    return trace_frozen(module, (), named=named)


def write_graphs(graphs: dict[str, ExportedProgram], path: Path, _shape: Shape, _generation: Generation) -> None:
    """Write the file; the signatures share their weights."""
    check_size(graphs["decode"].state_dict.values(), "tflite")
    converter: Any = litert_torch
    for name, graph in graphs.items():
        converter = converter.signature(name, graph.module(check_guards=False), sample_kwargs=graph.example_inputs[1])
    converter.convert().export(str(path))
