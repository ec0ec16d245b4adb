"""Tiny factored language models to export with a cache, and how their files are played."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from make.decoders import VOCABULARY, make_decoder
from rankship_pipeline.export import Expected
from rankship_pipeline.export.decoders import write_decoder
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.models.huggingface import ByPosition
from rankship_targets.agent.decoders import Decoder

CONTEXT, PROMPT = 24, 5
RANK = 7
GENERATION = Generation(context=CONTEXT, vocabulary=VOCABULARY, begin=1, ends=(2, 3), prompt_tokens=PROMPT)
TOKENS: NDArray[np.int64] = np.random.default_rng(0).integers(0, VOCABULARY, CONTEXT)
_FACTORED = {"q_proj", "o_proj", "down_proj", "c_fc"}


@dataclass(frozen=True)
class Generating:
    """A model, its file, and what torch says after each of TOKENS without a cache."""

    format_name: Format
    module: nn.Module
    path: Path
    expected: Expected
    wanted: NDArray[np.float32]

    def play(self, decoder: Decoder, *parts: int) -> float:
        """Step through TOKENS, from the decoder's position, in parts of these lengths; the largest relative error."""
        worst = 0.0
        for count in parts:
            end = decoder.position + count
            found = decoder.step(TOKENS[decoder.position : end])
            worst = max(worst, float(np.abs(found - self.wanted[end - 1]).max() / np.abs(self.wanted).max()))
        return worst


def make_generating(name: str) -> ByPosition:
    """A language model, in whose blocks some layers are pairs."""
    model = _make_other(name) if name in {"gemma3", "gpt2"} else make_decoder(name)
    for path, layer in list(model.named_modules()):
        parent, _, last = path.rpartition(".")
        if last in _FACTORED:
            setattr(model.get_submodule(parent), last, _factor(layer))
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.3)  # also the row of padding, whose zeros have no scale
    return ByPosition(model.eval(), ("input_ids",)).eval()


def _factor(layer: Any) -> nn.Module:  # noqa: ANN401 - a linear layer of torch or of transformers
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    pair = nn.Sequential(nn.Linear(weight.shape[1], RANK, bias=False), nn.Linear(RANK, len(weight)))
    for part in pair:
        nn.init.normal_(part.weight, std=0.3)  # type: ignore[arg-type]
    return pair


def _make_other(name: str) -> Any:  # noqa: ANN401 - transformers has no types
    import transformers

    own: dict[str, Any]
    if name == "gpt2":
        kind, own = "GPT2Config", {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    else:
        kind = "Gemma3TextConfig"
        own = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.1,
        }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, kind)(vocab_size=VOCABULARY, **own)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]


def export_generating(name: str, format_name: Format, folder: Path) -> Generating:
    """Export a model of this family to a file in a folder."""
    module = make_generating(name)
    path = folder / f"model.{FACTS[format_name].suffix}"
    expected = write_decoder(module, format_name, path, GENERATION)
    with torch.no_grad():
        wanted = module(torch.from_numpy(TOKENS)[None])
    assert isinstance(wanted, torch.Tensor)
    return Generating(format_name, module, path, expected, wanted[0].numpy())
