"""Tiny language models of several families, saved as large ones are."""

import random
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


def save_speaking(folder: Path, name: str = "llama") -> Path:
    """An untrained language model in several files, with a tokenizer that knows the words w00, w01, ….

    Its weights are as large as a trained one's: what a layer computes matters.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index:02}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w00"))  # noqa: S106 - a word, no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made: Any = PreTrainedTokenizerFast
    made(tokenizer_object=tokenizer, eos_token="w01").save_pretrained(folder)  # noqa: S106 - as above
    return save_sharded(make_decoder(name), folder)


def write_words(path: Path, count: int) -> Path:
    """A text of so many words that such a tokenizer knows."""
    draw = random.Random(0)  # noqa: S311 - no secret
    path.write_text(" ".join(f"w{draw.randrange(VOCABULARY):02}" for _ in range(count)), encoding="utf-8")
    return path
