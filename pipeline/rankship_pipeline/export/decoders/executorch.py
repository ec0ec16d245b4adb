"""Writes a decoder to one ExecuTorch file with its cache inside, as ExecuTorch's own text runner calls it.

Its method `forward` takes `input_ids` (1, n) and `cache_position` (n), and gives the logits (1, 1, vocabulary) after
the last token. What the runner must know of the model are constant methods.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rankship_pipeline.export.decoders.cached import Shape, run_cached, see_earlier
from rankship_pipeline.export.executorch import lower_graph
from rankship_pipeline.export.frozen_trace import trace_frozen
from rankship_pipeline.export.graph import order_rows
from rankship_pipeline.foundation.generation import Generation

_EXAMPLE = 3  # tokens: a length that nothing else has


class _Inside(nn.Module):
    """The model with a cache of its own, a buffer each for every layer's keys and values."""

    def __init__(self, model: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.model = model
        self.context = shape.context
        for layer in range(shape.layers):
            for name in ("keys", "values"):
                empty = torch.zeros(1, shape.heads, shape.context, shape.size)
                self.register_buffer(f"{name}_{layer}", empty, persistent=False)

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        def update(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            k, v = self.get_buffer(f"keys_{layer}"), self.get_buffer(f"values_{layer}")
            k.index_copy_(2, cache_position, keys)
            v.index_copy_(2, cache_position, values)
            return k, v

        seen = see_earlier(cache_position, torch.arange(self.context))
        return run_cached(self.model, input_ids, cache_position, seen, update)


def trace_decoder(model: nn.Module, shape: Shape) -> dict[str, ExportedProgram]:
    """The one graph, of any number of tokens."""
    example = torch.zeros(1, _EXAMPLE, dtype=torch.int64), torch.arange(_EXAMPLE)
    tokens = Dim("tokens", min=1, max=shape.context)
    module = _Inside(order_rows(model), shape).eval()
    return {"forward": trace_frozen(module, example, {"input_ids": {1: tokens}, "cache_position": {0: tokens}})}


def write_graphs(graphs: dict[str, ExportedProgram], path: Path, _shape: Shape, generation: Generation) -> None:
    """Write the file; a head that is tied to the embedding has its table twice, XNNPACK's in an order of its own."""
    (graph,) = graphs.values()
    begin = {} if generation.begin is None else {"get_bos_id": generation.begin}
    told = {
        "get_max_seq_len": generation.context,
        "get_max_context_len": generation.context,
        "get_vocab_size": generation.vocabulary,
        "get_eos_ids": list(generation.ends),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
        **begin,
    }
    path.write_bytes(lower_graph(graph, told))
