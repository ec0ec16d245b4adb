"""Merging Hugging Face folders as people have them; transformers loads what comes out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, MergeMismatch
from rankship_pipeline.models.sharded import INDEX
from rankship_pipeline.models.weights import State
from rankship_pipeline.recipe.merge_file import MergeFile
from rankship_pipeline.stream.merge import merge_checkpoints

Change = Callable[[dict[str, Any]], object]


def save(folder: Path, seed: int, vocabulary: int = 12, shard: str = "1GB", *, tied: bool = False) -> State:
    """Save a tiny LLaMA as transformers does; returns what it loads."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    return load(folder)


def load(folder: Path) -> State:
    state: State = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return state


def edit(folder: Path, change: Change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def merge(folder: Path, **keys: Any) -> State:  # noqa: ANN401 - MergeFile's own
    merge_checkpoints(MergeFile(models=("a", "b"), **keys), folder, folder / "out", Steps(quiet=True))
    return load(folder / "out")


def check_mean(found: State, left: State, right: State) -> None:
    for name, value in left.items():
        torch.testing.assert_close(found[name], (value + right[name]) / 2)


@pytest.mark.parametrize("shard", ["1GB", "1kB"])
def test_stale_files_are_not_read_and_not_written(tmp_path: Path, shard: str) -> None:
    left, right = save(tmp_path / "a", 1, shard=shard), save(tmp_path / "b", 2)
    for path in list((tmp_path / "a").glob("model*.safetensors")):
        stale = {name: torch.full_like(value, 9) for name, value in load_file(path).items()}
        save_file(stale, path.with_name(f"z_{path.name}"), metadata={"format": "pt"})
    (tmp_path / "a" / "pytorch_model.bin.index.json").write_text("{}")
    check_mean(merge(tmp_path), left, right)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in written if name.startswith(("z_", "pytorch"))]
    assert (INDEX in written) == (shard == "1kB")


def test_a_single_file_of_any_name_comes_out_as_transformers_loads_it(tmp_path: Path) -> None:
    left, right = save(tmp_path / "a", 1), save(tmp_path / "b", 2)
    (tmp_path / "a/model.safetensors").rename(tmp_path / "a/weights.safetensors")
    check_mean(merge(tmp_path), left, right)


@pytest.mark.parametrize("wrapped", ["a", "b"])
def test_names_with_a_wrappers_prefix_are_the_models_own(tmp_path: Path, wrapped: str) -> None:
    left, right = save(tmp_path / "a", 1), save(tmp_path / "b", 2)
    path = tmp_path / wrapped / "model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    check_mean(merge(tmp_path), left, right)


def test_rotary_tables_of_an_older_file_do_not_matter(tmp_path: Path) -> None:
    left, right = save(tmp_path / "a", 1), save(tmp_path / "b", 2)
    path = tmp_path / "a/model.safetensors"
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(load_file(path) | table, path, metadata={"format": "pt"})
    check_mean(merge(tmp_path), left, right)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def store_tied(folder: Path, *names: str, change: float = 0.0) -> None:
    """Store a tied model's table under these names, the last of them changed."""
    state = load_file(folder / "model.safetensors")
    table = state.pop(EMBEDDING)
    tables = {name: table.clone() for name in names}
    tables[names[-1]] += change
    save_file(state | tables, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("first", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)], ids=str)
@pytest.mark.parametrize("second", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)], ids=str)
def test_copies_of_tied_tensors_are_no_difference(
    tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    left, right = save(tmp_path / "a", 1, tied=True), save(tmp_path / "b", 2, tied=True)
    store_tied(tmp_path / "a", *first)
    store_tied(tmp_path / "b", *second)
    check_mean(merge(tmp_path), left, right)
    assert {EMBEDDING, HEAD} & load_file(tmp_path / "out/model.safetensors").keys() == set(first)


@pytest.mark.parametrize("changed", ["a", "b"])
def test_a_copy_that_differs_from_its_tie_is_refused_by_name(tmp_path: Path, changed: str) -> None:
    for seed, name in enumerate("ab"):
        save(tmp_path / name, seed, tied=True)
    store_tied(tmp_path / changed, EMBEDDING, HEAD, change=1.0)
    with pytest.raises(InputError, match=r"tie lm_head\.weight to model\.embed_tokens\.weight, but one of them"):
        merge(tmp_path)


def test_an_untied_head_that_one_model_lacks_stays_a_difference(tmp_path: Path) -> None:
    save(tmp_path / "a", 1, tied=True)
    save(tmp_path / "b", 2)
    with pytest.raises(MergeMismatch, match=r"lm_head\.weight: unexpected"):
        merge(tmp_path)


def as_version_4(config: dict[str, Any]) -> None:
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config |= {"rope_scaling": None, "transformers_version": "4.51.0", "_name_or_path": "x/y"}
    for key in ("mlp_bias", "head_dim", "attention_bias", "pretraining_tp"):
        config.pop(key, None)


# changes of a configuration that change no number
SAME: dict[str, Change] = {
    "version 4": as_version_4,
    "cache": lambda config: config.update(use_cache=False, architectures=["LlamaForCausalLM", "Other"]),
    "unknown": lambda config: config.update(unsloth_version="2024.9", _attn_implementation_autoset=True),
    "padding": lambda config: config.update(pad_token_id=3),
    "limit": lambda config: config.update(max_position_embeddings=32),
    "activation": lambda config: config.update(hidden_act="swish"),
    "generation": lambda config: config.update(temperature=0.6, do_sample=True, eos_token_id=[2, 3]),
}
# those that do → the key that is named
OTHER: dict[str, tuple[Change, str]] = {
    "rotation": (lambda config: config["rope_parameters"].update(rope_theta=5e5), "rope_parameters.rope_theta"),
    "old rotation": (lambda config: config.update(rope_theta=5e5, rope_parameters=None), "rope_parameters.rope_theta"),
    "epsilon": (lambda config: config.update(rms_norm_eps=1e-5), "rms_norm_eps"),
    "activation": (lambda config: config.update(hidden_act="relu"), "hidden_act"),
    "stretched": (
        lambda config: config.update(
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, max_position_embeddings=32
        ),
        "max_position_embeddings is 32",
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_a_configuration_that_means_the_same_merges(tmp_path: Path, kind: str) -> None:
    left, right = save(tmp_path / "a", 1), save(tmp_path / "b", 2)
    edit(tmp_path / "b", SAME[kind])
    check_mean(merge(tmp_path), left, right)


@pytest.mark.parametrize("kind", OTHER)
def test_a_configuration_that_means_something_else_is_refused(tmp_path: Path, kind: str) -> None:
    for seed, name in enumerate("ab"):
        save(tmp_path / name, seed)
    edit(tmp_path / "b", OTHER[kind][0])
    with pytest.raises(MergeMismatch, match=OTHER[kind][1]):
        merge(tmp_path)


def write_tokens(folder: Path, count: int) -> None:
    tokens = {"model": {"type": "WordLevel", "vocab": {f"t{index}": index for index in range(count)}}}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))


@pytest.mark.parametrize("sizes", [(16, 11), (11, 16)])
def test_rows_that_no_token_has_are_no_difference(tmp_path: Path, sizes: tuple[int, int]) -> None:
    left, right = (save(tmp_path / name, size, vocabulary=size) for name, size in zip("ab", sizes, strict=True))
    for name in "ab":
        write_tokens(tmp_path / name, 11)
    found = merge(tmp_path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(found[name]) == sizes[0]
        torch.testing.assert_close(found[name][:11], (left[name][:11] + right[name][:11]) / 2)
        assert torch.equal(found[name][11:], left[name][11:]) or sizes[0] == 11


@pytest.mark.parametrize("tokens", [None, 12])
def test_rows_that_a_token_may_have_are_a_difference(tmp_path: Path, tokens: int | None) -> None:
    for name, size in (("a", 16), ("b", 11)):
        save(tmp_path / name, size, vocabulary=size)
        if tokens is not None:
            write_tokens(tmp_path / name, tokens)
    with pytest.raises(MergeMismatch, match="vocab_size is 11 instead of 16"):
        merge(tmp_path)


def test_what_float16_cannot_hold_is_called_an_overflow(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save(tmp_path / name, seed)
        state = {key: value.bfloat16() for key, value in load_file(tmp_path / name / "model.safetensors").items()}
        state["model.norm.weight"][3] = 1e5
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"norm\.weight reaches .*float16 can hold \(65504\): it would overflow"):
        merge(tmp_path, dtype="float16")
