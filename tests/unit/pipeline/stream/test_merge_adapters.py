"""Adapters of every kind that peft saves: the merged folder gives peft's own logits, or a refusal names the reason."""

import json
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from make.adapters import run_model, save_gpt2, save_llama, train_adapter
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.lora import WEIGHTS, read_adapter
from rankship_pipeline.models.lora_config import CONFIG
from rankship_pipeline.recipe.choices import MergeChoice
from rankship_pipeline.recipe.merge_file import MergeFile
from rankship_pipeline.stream.merge import merge_checkpoints

SAVERS = {"llama": save_llama, "gpt2": save_gpt2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, saver in SAVERS.items():
        for tied in (False, True):
            saver(folder / f"{name}{'-tied' if tied else ''}", tie_word_embeddings=tied)
    return folder


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


def merge(base: Path, adapter: Path) -> torch.Tensor:
    """The logits of `adapter` merged into `base` by plain addition, as transformers loads the new folder."""
    asked = MergeFile(
        models=(str(adapter),), base=str(base), merge=MergeChoice(method="task-arithmetic", scale=1), dtype="float32"
    )
    merge_checkpoints(asked, adapter.parent, adapter.parent / "out", Steps(quiet=True))
    return run_model(transformers.AutoModelForCausalLM.from_pretrained(adapter.parent / "out"))


LAYERS = ["q_proj", "v_proj", "down_proj"]
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": LAYERS, "lora_alpha": 6}),
    "chosen-layers": ("llama", {"target_modules": LAYERS, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "all-but-one": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "lora_dropout": 0.1}),
    "rank-stabilised": (
        "llama",
        {
            "target_modules": LAYERS,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"1.self_attn.q_proj": 32},
        },
    ),
    "orthogonal": ("llama", {"target_modules": LAYERS, "init_lora_weights": "orthogonal"}),
    "gaussian": ("llama", {"target_modules": LAYERS, "init_lora_weights": "gaussian"}),
    "eva": ("llama", {"target_modules": LAYERS, "init_lora_weights": "eva"}),
    "mica": ("llama", {"target_modules": LAYERS, "init_lora_weights": "mica"}),
    "embedding-as-peft-saves-it": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head-as-peft-saves-it": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "trained-embedding-and-head": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tied-adapter": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied-embedding": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "transposed": ("gpt2-tied", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "transposed-and-not": ("gpt2", {"target_modules": ["c_proj", "lm_head"]}),  # peft notes what the last layer was
    "biases": ("gpt2-tied", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "all-biases": ("gpt2-tied", {"target_modules": ["c_attn"], "bias": "all"}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_merged_adapter_gives_pefts_own_logits(name: str, bases: Path, tmp_path: Path) -> None:
    base, options = RIGHT[name]
    wanted = train_adapter(bases / base, tmp_path / "lora", **options)
    plain = run_model(transformers.AutoModelForCausalLM.from_pretrained(bases / base))
    found = merge(bases / base, tmp_path / "lora")
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (plain - wanted).abs().max() > 0.01 * wanted.abs().max()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}, '`init_lora_weights = "pissa"`'),
    "olora": ("llama", {"init_lora_weights": "olora"}, '`init_lora_weights = "olora"`'),
    "dora": ("llama", {"use_dora": True}, "`use_dora = true`"),
    "lora-bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}, "`lora_bias = true`"),
    "replicated": ("llama", {"layer_replication": [(0, 2), (1, 2)]}, "`layer_replication = "),
    "tokens": ("llama", {"trainable_token_indices": [3, 5]}, "`trainable_token_indices = [3, 5]`"),
    "parameters": ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}, "`target_parameters = "),
    "resized": ("llama", {"resized": 52, "save": {"save_embedding_layers": True}}, "resized from 48 to 52 tokens"),
    "resized-embedding": ("llama", {"resized": 52, "target_modules": ["embed_tokens"]}, "resized from 48 to 52 tokens"),
    "tied": (
        "llama-tied",
        {"target_modules": ["embed_tokens"]},
        "its model ties model.embed_tokens.weight and lm_head",
    ),
    "tied-head": ("llama-tied", {"target_modules": ["lm_head"]}, "changes lm_head.weight, but its model ties"),
    "tied-apart": ("llama-tied", {"target_modules": ["lm_head", "embed_tokens"]}, "one tensor cannot be both"),
    "tied-trained": ("llama-tied", {"modules_to_save": ["embed_tokens"]}, "one tensor cannot be both"),
    "tied-gpt2": ("gpt2-tied", {"target_modules": ["wte"]}, "ties transformer.wte.weight and lm_head.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_the_trained_model_is_refused_by_name(name: str, bases: Path, tmp_path: Path) -> None:
    base, options, complaint = REFUSED[name]
    train_adapter(bases / base, tmp_path / "lora", **{"target_modules": LAYERS, **options})
    with pytest.raises(InputError, match=re.escape(complaint)) as failure:
        merge(bases / base, tmp_path / "lora")
    assert failure.value.hint
    assert not (tmp_path / "out").exists()


def test_pissa_converted_to_its_initial_model_is_a_plain_adapter_of_twice_the_rank(bases: Path, tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama")
    config = peft.LoraConfig(r=2, target_modules=LAYERS, init_lora_weights="pissa")
    adapted: Any = peft.get_peft_model(model, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(str(tmp_path / "initial"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    wanted = run_model(adapted)
    adapted.save_pretrained(str(tmp_path / "lora"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert json.loads((tmp_path / "lora" / CONFIG).read_text())["r"] == 4
    found = merge(bases / "llama", tmp_path / "lora")
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_line_that_a_refusal_gives_makes_the_trained_model(bases: Path, tmp_path: Path) -> None:
    wanted = train_adapter(bases / "llama", tmp_path / "lora", target_modules=LAYERS, init_lora_weights="pissa")
    with pytest.raises(InputError, match="is not supported") as failure:
        read_adapter(tmp_path / "lora")
    line = str(failure.value.hint).partition(": ")[2]
    subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True, capture_output=True)
    found = run_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora-merged"))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_base_that_was_untied_as_the_refusal_says_takes_the_adapter(bases: Path, tmp_path: Path) -> None:
    wanted = train_adapter(bases / "llama-tied", tmp_path / "lora", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(InputError, match="ties") as failure:
        merge(bases / "llama-tied", tmp_path / "lora")
    line = str(failure.value.hint).partition("give that: ")[2].replace("NEW_FOLDER", "folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(bases / "llama-tied")
    exec(line, {"model": model, "torch": torch, "folder": tmp_path / "untied"})  # noqa: S102 - the hint's own words
    found = merge(tmp_path / "untied", tmp_path / "lora")
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_base_without_the_backbones_name_takes_the_adapter(bases: Path, tmp_path: Path) -> None:
    wanted = train_adapter(bases / "gpt2-tied", tmp_path / "lora", target_modules=["c_attn", "c_proj"])
    state = load_file(bases / "gpt2-tied" / "model.safetensors")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((bases / "gpt2-tied" / "config.json").read_bytes())
    bare = {name.removeprefix("transformer."): one for name, one in state.items() if name != "lm_head.weight"}
    save_file(bare, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    assert "h.0.attn.c_attn.weight" in bare
    found = merge(tmp_path / "bare", tmp_path / "lora")
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_another_base_than_the_one_named_is_noted(
    bases: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_adapter(bases / "llama", tmp_path / "lora", target_modules=["embed_tokens"])
    save_llama(tmp_path / "other", rms_norm_eps=1e-6)
    state = load_file(tmp_path / "other" / "model.safetensors")
    changed = {**state, "model.embed_tokens.weight": 2 * state["model.embed_tokens.weight"]}
    save_file(changed, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {"model": {"vocab": {"one": 0, "two": 1}}}
    (tmp_path / "lora" / "tokenizer.json").write_text(json.dumps(vocabulary))
    asked = MergeFile(models=("lora",), base="other", merge=MergeChoice(method="task-arithmetic"))
    merge_checkpoints(asked, tmp_path, tmp_path / "out", Steps())
    said = capfd.readouterr().err
    assert f"says that it was trained on {bases / 'llama'}: it is added to {tmp_path / 'other'}" in said
    assert "has its own model.embed_tokens.weight, which is not the base's" in said
    assert "has its own tokenizer of 2 tokens; the new folder gets that of" in said


def test_a_quantised_model_is_refused_by_its_method(bases: Path, tmp_path: Path) -> None:
    train_adapter(bases / "llama", tmp_path / "lora", target_modules=LAYERS)
    (tmp_path / "base").mkdir()
    config = json.loads((bases / "llama" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    (tmp_path / "base" / "model.safetensors").write_bytes((bases / "llama" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"base is stored quantised \(gptq\)"):
        merge(tmp_path / "base", tmp_path / "lora")


def test_a_file_with_more_than_an_adapter_is_refused(bases: Path, tmp_path: Path) -> None:
    train_adapter(bases / "llama", tmp_path / "lora", target_modules=LAYERS)
    state = load_file(tmp_path / "lora" / WEIGHTS)
    for name, complaint in (
        ("model.layers.0.mlp.up_proj.lora_magnitude_vector", "is not a part of a plain LoRA"),
        ("model.layers.0.mlp.up_proj.gain", "lacks model.layers.0.mlp.up_proj.gain"),
    ):
        save_file({**state, f"base_model.model.{name}": torch.ones(2)}, tmp_path / "lora" / WEIGHTS)
        with pytest.raises(InputError, match=complaint):
            merge(bases / "llama", tmp_path / "lora")
