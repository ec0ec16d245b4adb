"""Tiny language models of several families, saved as large ones are."""

from pathlib import Path
from typing import Any

import torch

BLOCKS, VOCABULARY = 3, 50
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),  # grouped-query attention with biases, a tied head
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8}),  # blocks of two kinds, scaled embedding
}


def make_decoder(name: str, dtype: torch.dtype = torch.float32) -> Any:  # noqa: ANN401 - transformers has no types
    """An untrained language model of three blocks, whose norms and biases are not just ones and zeros."""
    import transformers  # where it is not installed, whole files of tests are skipped

    kind, own = ARCHITECTURES[name]
    config = getattr(transformers, kind)(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        **own,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def save_sharded(model: Any, folder: Path) -> Path:  # noqa: ANN401 - transformers has no types
    """Save a model in several files, as large ones come."""
    model.save_pretrained(folder, max_shard_size="20kB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder
