"""Small language models, and LoRA adapters of every kind on them, as peft saves them."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

IDS = torch.arange(12).reshape(2, 6) * 7 % 48


def save_llama(folder: Path, **options: Any) -> Path:  # noqa: ANN401 - LlamaConfig's own
    """A random Llama of two layers and 48 tokens."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return _save(
        transformers.LlamaForCausalLM, transformers.LlamaConfig(**{"vocab_size": 48, **sizes, **options}), folder
    )


def save_gpt2(folder: Path, **options: Any) -> Path:  # noqa: ANN401 - GPT2Config's own
    """A random GPT-2 of one layer and 48 tokens, whose square weights look alike transposed."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    return _save(
        transformers.GPT2LMHeadModel, transformers.GPT2Config(**{"vocab_size": 48, **sizes, **options}), folder
    )


def _save(kind: Any, config: Any, folder: Path) -> Path:  # noqa: ANN401 - transformers has no types
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape) + (parameter.ndim == 1))
    model.save_pretrained(folder)
    return folder


def run_model(model: torch.nn.Module) -> Tensor:
    """A language model's logits (2, 6, 48) for the same ids every time."""
    with torch.no_grad():
        logits: Tensor = model.eval()(IDS).logits
    return logits


def train_adapter(base: Path, folder: Path, **options: Any) -> Tensor:  # noqa: ANN401 - LoraConfig's own
    """Save an adapter whose trained parameters were moved at random; the logits of peft's own model."""
    resized, save = options.pop("resized", None), options.pop("save", {})
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    if resized is not None:
        model.resize_token_embeddings(resized)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, **options}))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    logits = run_model(adapted)
    adapted.save_pretrained(str(folder), **save)
    return logits
