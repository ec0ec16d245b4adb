"""Merging by a recipe: copies of tied tensors in the files of Hugging Face models."""

from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from rankship_pipeline.align.differences import check_mergeable
from rankship_pipeline.foundation.errors import MergeMismatch
from rankship_pipeline.models.opened import open_sources
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source, list_sources

SOURCES = tuple(Source(name=name, huggingface=name, task="text-generation", inputs=("input_ids",)) for name in "ab")
RECIPE = Recipe(name="r", models=SOURCES, data=DataChoice(loader="x.py:x"))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_copy_is_no_difference_unless_it_differs(tmp_path: Path, change: float) -> None:
    for name in "ab":
        config = transformers.LlamaConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=12,
            tie_word_embeddings=True,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    state = load_file(tmp_path / "b/model.safetensors")
    assert HEAD not in state
    save_file(state | {HEAD: state[EMBEDDING] + change}, tmp_path / "b/model.safetensors", metadata={"format": "pt"})
    opened = open_sources(list_sources(RECIPE), tmp_path, 0)
    if change:
        with pytest.raises(MergeMismatch, match=r"b against a: lm_head\.weight: unexpected"):
            check_mergeable(RECIPE, opened)
    else:
        check_mergeable(RECIPE, opened)
