"""Tiny language models with a tokenizer of words, saved as Hugging Face saves them, and text for them."""

from pathlib import Path
from typing import Any

import torch

WORDS = ("the", "cat", "dog", "bird", "sees", "likes", "a", "red", "blue", "house", "and", ".", "then", "runs", "home")
SPECIAL = ("<s>", "</s>", "<unk>")
VOCABULARY = len(SPECIAL) + len(WORDS)


def write_text(file: Path, sentences: int = 120) -> Path:
    """Write a text whose words depend on those before, the same every time."""
    generator = torch.Generator().manual_seed(1)
    words = [WORDS[0]]
    for _ in range(8 * sentences):
        place = WORDS.index(words[-1])
        words.append(WORDS[(3 * place + int(torch.randint(1, 4, (), generator=generator))) % len(WORDS)])
    lines = [" ".join(words[at : at + 8]) for at in range(0, 8 * sentences, 8)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def save_writer(folder: Path, seed: int = 0, **changes: Any) -> Path:  # noqa: ANN401 - what transformers takes
    """Save an untrained LLaMA of two blocks, whose head is its embedding, with its tokenizer."""
    import transformers  # where it is not installed, whole files of tests are skipped

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = transformers.LlamaConfig(**{**sizes, **changes})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save the tokenizer of words, which begins a text with <s>."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    numbers = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=SPECIAL[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names: dict[str, Any] = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "unk_token": SPECIAL[2]}
    kind: Any = transformers.PreTrainedTokenizerFast
    kind(tokenizer_object=tokenizer, **names).save_pretrained(folder)
