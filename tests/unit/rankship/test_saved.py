"""Saved and loaded: safetensors and the plan, for plain torch models, transformers models and streamed ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rankship as rs
from make.sessions import make_net
from rankship_pipeline.factors.saved_model import RECORD, WEIGHTS
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.errors import InputError


@pytest.fixture
def small(net: nn.Module, inputs: Tensor) -> rs.Compressed:
    return rs.compress(net, inputs, kept_parameters=0.5, progress=False)


def make_bert() -> Any:  # noqa: ANN401 - transformers has no types
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    config.num_labels = 3
    return transformers.BertForSequenceClassification(config)


IDS = torch.randint(1, 30, (24, 8), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def compress_bert() -> rs.Compressed:
    ranks = rs.RankChoice(step=2, exclude=("classifier",))
    return rs.compress(make_bert(), BATCH, kept_parameters=0.8, ranks=ranks, progress=False)


def test_a_saved_model_loads_into_its_architecture(small: rs.Compressed, inputs: Tensor, tmp_path: Path) -> None:
    folder = small.save(tmp_path / "out")
    into = make_net(9)
    loaded = rs.load(folder, into=into)
    assert torch.equal(loaded(inputs), small.module(inputs))
    assert not loaded.training
    assert torch.equal(into(inputs), make_net(9)(inputs)), "the architecture given stays as it is"
    again = rs.Compressed.from_pretrained(folder, make_net())
    assert again.plan == small.plan
    assert again.report()


def test_a_folder_holds_safetensors_and_text_alone(small: rs.Compressed, tmp_path: Path) -> None:
    names = sorted(path.name for path in small.save(tmp_path).iterdir())
    assert names == [WEIGHTS, RECORD]
    said = json.loads((tmp_path / RECORD).read_text())
    assert said["architecture"] == "torch.nn.modules.container.Sequential"
    assert {layer["name"] for layer in said["plan"]["layers"]} == {"0", "2", "4"}


def test_a_merged_model_is_saved_without_a_plan(net: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    one = rs.merge([net, make_net(3)], {"a": inputs, "b": inputs}, progress=False)
    assert torch.equal(rs.load(one.save(tmp_path), into=make_net())(inputs), one.module(inputs))
    with pytest.raises(InputError, match="nothing in it is factored"):
        rs.Compressed.from_pretrained(tmp_path, make_net())


def test_a_loaded_model_does_not_know_its_recipe(small: rs.Compressed, tmp_path: Path) -> None:
    again = rs.Compressed.from_pretrained(small.save(tmp_path), make_net())
    for use in (lambda: again.recipe, again.to_recipe, lambda: rs.export(again, tmp_path / "files")):
        with pytest.raises(InputError, match="loaded from a folder"):
            use()


def test_code_is_never_taken_from_the_folder(small: rs.Compressed, tmp_path: Path) -> None:
    small.save(tmp_path)
    with pytest.raises(InputError, match=r"but not its code") as caught:
        rs.load(tmp_path)
    assert "into=" in caught.value.hint
    said = json.loads((tmp_path / RECORD).read_text())
    for name in ("BertConfig", "logging", "Nonsense", "os.system"):
        (tmp_path / RECORD).write_text(json.dumps(said | {"family": "transformers", "architecture": name}))
        with pytest.raises(InputError, match="is not a model of transformers"):
            rs.load(tmp_path)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 6))])
def test_another_architecture_is_refused(other: nn.Module, small: rs.Compressed, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds a torch\.nn\.modules\.container\.Sequential"):
        rs.load(small.save(tmp_path), into=other)


def test_pickles_and_folders_of_something_else_are_refused(small: rs.Compressed, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"holds no {RECORD}"):
        rs.load(tmp_path)
    small.save(tmp_path)
    torch.save(small.state_dict(), tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="pickle"):
        rs.load(tmp_path, into=make_net())


def test_a_transformers_model_is_saved_and_loaded_as_others_are(tmp_path: Path) -> None:
    small = compress_bert()
    assert isinstance(small.module, transformers.BertForSequenceClassification)
    assert "bert.encoder.layer.0.attention.self.query" in {layer.name for layer in small.plan.layers}
    assert "classifier" not in {layer.name for layer in small.plan.layers}
    folder = small.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS, RECORD]
    loaded = rs.load(folder)
    assert isinstance(loaded, transformers.BertForSequenceClassification)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**BATCH).logits, small.module(**BATCH).logits)
    assert rs.Compressed.from_pretrained(folder).plan == small.plan


def test_the_users_transformers_model_keeps_its_attention() -> None:
    model = make_bert()
    before = model.config._attn_implementation
    rs.compress(model, BATCH, kept_parameters=0.8, ranks=rs.RankChoice(step=2), progress=False)
    assert model.config._attn_implementation == before != "eager"


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    small = rs.compress(model, IDS, kept_parameters=0.9, ranks=rs.RankChoice(step=2), progress=False)
    loaded: Any = rs.load(small.save(tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IDS).logits, small.module(IDS).logits)


def test_the_bare_plan_of_earlier_streams_is_still_read(tmp_path: Path) -> None:
    small = compress_bert()
    small.save(tmp_path)
    (tmp_path / RECORD).write_text(encode(small.plan))
    with torch.inference_mode():
        torch.testing.assert_close(rs.load(tmp_path)(**BATCH).logits, small.module(**BATCH).logits)
