"""Tiny transformers of text, saved as Hugging Face saves them."""

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
    "num_labels": 3,
}


def save_bert(folder: Path, seed: int = 0, **changes: Any) -> None:  # noqa: ANN401 - what transformers takes
    """Save an untrained classifier of sequences; `changes` are of its configuration."""
    import transformers  # where it is not installed, whole files of tests are skipped

    torch.manual_seed(seed)
    config = transformers.BertConfig(**{**SIZES, **changes})
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
