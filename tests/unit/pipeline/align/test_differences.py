"""Every rule finds its one bad pair, all findings stand in one list, and no weight is read."""

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from make import berts
from rankship_pipeline.align.advice import PREPARATION, SETTINGS
from rankship_pipeline.align.differences import RULES, Finding, check_mergeable
from rankship_pipeline.align.facts import Facts, gather_facts
from rankship_pipeline.align.make_alike import Mend
from rankship_pipeline.foundation.errors import InputError, MergeMismatch
from rankship_pipeline.models import weights
from rankship_pipeline.models.model_config import read_normalisation
from rankship_pipeline.models.opened import OpenedSource, open_sources
from rankship_pipeline.models.weights import TensorHeader, read_state, refuse_broken
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source, list_sources
from rankship_pipeline.recipe.normalisation import Normalisation

HALF, NONE = (Normalisation(mean=(one,), std=(two,)) for one, two in ((0.5, 0.5), (0.0, 1.0)))
GOOD = Facts(
    name="a",
    tensors={"w": TensorHeader((2, 3), "F32"), "n": TensorHeader((), "I64"), "table": TensorHeader((8, 4), "F32")},
    settings={"layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "vocab_size": 8},
    labels=("cat", "dog"),
    tokens={"[PAD]": 0, "the": 1, "a": 2},
    preparation={"do_lower_case": True, "size": {"height": 8}, "resample": 2, "unheard_of": 1},
    normalise=HALF,
    files=(Path("a"),),
)
OTHER = replace(GOOD, name="b", files=(Path("b"),))
RECIPE = Recipe(name="r", models=(), data=DataChoice(loader="x.py:x"))

# what differs in b → rule, words of the finding, whether it is refused
PAIRS: dict[str, tuple[dict[str, Any], str, str, bool]] = {
    "missing": ({"tensors": {key: GOOD.tensors[key] for key in ("w", "table")}}, "tensors", "n: missing", True),
    "extra": ({"tensors": {**GOOD.tensors, "z": TensorHeader((1,), "F32")}}, "tensors", "z: unexpected", True),
    "shape": (
        {"tensors": {**GOOD.tensors, "w": TensorHeader((4, 3), "F32")}},
        "tensors",
        "w: shape [4, 3] instead of [2, 3]",
        True,
    ),
    "half precision": (
        {"tensors": {**GOOD.tensors, "w": TensorHeader((2, 3), "BF16")}},
        "types",
        "w: stored as BF16 instead of F32",
        False,
    ),
    "counter": ({"tensors": {**GOOD.tensors, "n": TensorHeader((), "I32")}}, "types", "n: stored as I32", False),
    "quantised": ({"tensors": {**GOOD.tensors, "w": TensorHeader((2, 3), "I8")}}, "types", "w: stored as I8", True),
    "epsilon": (
        {"settings": {**GOOD.settings, "layer_norm_eps": 1e-5}},
        "settings",
        "layer_norm_eps is 1e-05 instead of 1e-12",
        True,
    ),
    "setting gone": (
        {"settings": {"layer_norm_eps": 1e-12, "vocab_size": 8}},
        "settings",
        "hidden_dropout_prob is None",
        False,
    ),
    "padding": (
        {
            "tensors": {**GOOD.tensors, "table": TensorHeader((5, 4), "F32")},
            "settings": {**GOOD.settings, "vocab_size": 5},
        },
        "padding",
        "table: 5 rows instead of 8 for the same 3 tokens",
        False,
    ),
    "other order": ({"labels": ("dog", "cat")}, "labels", "classes are ordered dog, cat", False),
    "other classes": ({"labels": ("cat", "cow")}, "labels", "only in a: dog; only in b: cow", True),
    "fewer classes": ({"labels": ("cat",)}, "labels", "only in a: dog; only in b: none", True),
    "no class names": ({"labels": ()}, "labels", "b names no classes", False),
    "fewer tokens": (
        {"tokens": {"[PAD]": 0, "the": 1}},
        "vocabularies",
        "vocabulary of 2 tokens instead of 3: missing a; extra none",
        True,
    ),
    "moved tokens": ({"tokens": {"[PAD]": 0, "the": 2, "a": 1}}, "vocabularies", "2 tokens have another number", True),
    "no tokenizer": ({"tokens": {}}, "vocabularies", "b comes without tokenizer files", False),
    "case": (
        {"preparation": {**GOOD.preparation, "do_lower_case": False}},
        "preparation",
        "do_lower_case is False instead of True",
        True,
    ),
    "size": ({"preparation": {**GOOD.preparation, "size": {"height": 9}}}, "preparation", "size is", True),
    "resample": ({"preparation": {**GOOD.preparation, "resample": 3}}, "preparation", "resample is 3", False),
    "normalisation": ({"normalise": NONE}, "normalisations", "mean [0.0], std [1.0] instead of mean [0.5]", True),
    "same file": ({"files": GOOD.files}, "files", "both are the same file", False),
}


def find(other: Facts, reference: Facts = GOOD, recipe: Recipe = RECIPE) -> dict[str, list[Finding]]:
    found = {name: list(rule(reference, other, recipe.data.normalise)) for name, rule in RULES.items()}
    return {name: findings for name, findings in found.items() if findings}


def test_models_that_differ_in_nothing_but_values_have_no_findings() -> None:
    assert find(OTHER) == {}


@pytest.mark.parametrize("name", ["bn.num_batches_tracked", "embeddings.position_ids", "rotary_emb.inv_freq"])
def test_what_is_not_trained_may_be_missing_or_extra(name: str) -> None:
    more = {**GOOD.tensors, name: TensorHeader((1, 4), "I64")}
    assert find(replace(OTHER, tensors=more)) == {}
    assert find(OTHER, replace(GOOD, tensors=more)) == {}
    assert find(replace(OTHER, tensors={**more, name: TensorHeader((1, 8), "F32")}), replace(GOOD, tensors=more)) == {}


@pytest.mark.parametrize("pair", PAIRS)
def test_every_rule_finds_its_one_bad_pair(pair: str) -> None:
    change, rule, words, refused = PAIRS[pair]
    found = find(replace(OTHER, **change))
    assert list(found) == [rule]
    (finding,) = found[rule]
    assert words in finding.text
    assert finding.refused is refused
    assert len(finding.remedy) > 10


def test_the_pairs_try_every_rule() -> None:
    assert {rule for _, rule, _, _ in PAIRS.values()} == RULES.keys()


@pytest.mark.parametrize("key", [key for key in SETTINGS if "*" not in key])
def test_every_named_setting_is_found(key: str) -> None:
    (finding,) = find(replace(OTHER, settings={**GOOD.settings, key: "x"}))["settings"]
    assert (finding.remedy, finding.refused) == SETTINGS[key]


@pytest.mark.parametrize("key", PREPARATION)
def test_every_kind_of_preparation_is_found(key: str) -> None:
    left, right = (replace(one, preparation={key: value}) for one, value in ((GOOD, 1), (OTHER, 2)))
    (finding,) = find(right, left)["preparation"]
    assert (finding.remedy, finding.refused) == PREPARATION[key]


def test_what_the_loader_gives_settles_different_normalisations() -> None:
    recipe = replace(RECIPE, data=DataChoice(loader="x.py:x", normalise=HALF))
    assert find(replace(OTHER, normalise=NONE), recipe=recipe) == {}


def test_an_image_processors_normalisation_is_written_for_pixels_up_to_one() -> None:
    usual = {"image_mean": [0.5], "image_std": [0.25], "rescale_factor": 1 / 255, "do_rescale": True}
    assert read_normalisation({**usual, "do_normalize": True}) == Normalisation(mean=(0.5,), std=(0.25,))
    assert read_normalisation({**usual, "do_normalize": False}) == Normalisation(mean=(0.0,), std=(1.0,))
    raw = read_normalisation({"image_mean": 127.5, "image_std": 51.0, "do_rescale": False})
    assert raw == Normalisation(mean=(0.5,), std=(0.2,))
    assert read_normalisation({}) is None


def test_one_value_for_all_channels_is_like_that_value_for_each() -> None:
    assert HALF.is_like(Normalisation(mean=(0.5,) * 3, std=(0.5 + 1e-12,) * 3))
    assert not HALF.is_like(Normalisation(mean=(0.5, 0.5, 0.4), std=(0.5,) * 3))


def save_bert(folder: Path, labels: Sequence[str] = ("neg", "pos"), **changes: object) -> None:
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 4)
    names: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    depth: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_labels": len(labels)}
    berts.save_bert(folder, **(sizes | depth | names | changes))
    (folder / "vocab.txt").write_text("[PAD]\nthe\na\ncat\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 4}))


def describe(*names: str, **change: object) -> Recipe:
    sources = tuple(
        Source(name=name, huggingface=name, task="sequence-classification", inputs=("input_ids",)) for name in names
    )
    return Recipe(name="r", models=sources, data=DataChoice(loader="x.py:x"), **change)  # type: ignore[arg-type]


def test_all_mismatches_of_all_models_stand_in_one_list(tmp_path: Path) -> None:
    save_bert(tmp_path / "a")
    save_bert(tmp_path / "b", layer_norm_eps=1e-5, hidden_dropout_prob=0.3, vocab_size=5, labels=["no", "yes"])
    (tmp_path / "b/vocab.txt").write_text("[PAD]\na\nthe\ncat\ndog\n")
    (tmp_path / "b/tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    save_bert(tmp_path / "c", hidden_act="relu")
    state = read_state(tmp_path / "c/model.safetensors")
    del state["classifier.bias"]
    save_file(state, tmp_path / "c/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeMismatch) as caught:
        check_mergeable(describe("a", "b", "c"), open_sources(list_sources(describe("a", "b", "c")), tmp_path, 0))
    message = str(caught.value)
    for line in (
        "b against a: embeddings.word_embeddings.weight: shape [5, 4] instead of [4, 4]",
        "b against a: layer_norm_eps is 1e-05 instead of 1e-12",
        "b against a: vocab_size is 5 instead of 4",
        "b against a: classes: only in a: neg, pos; only in b: no, yes",
        "b against a: vocabulary of 5 tokens instead of 4: missing none; extra dog",
        "b against a: 2 tokens have another number, among them a, the",
        "b against a: do_lower_case is False instead of True",
        "c against a: classifier.bias: missing",
        "c against a: hidden_act is 'relu' instead of 'gelu'",
    ):
        assert line in message
    assert "dropout" not in message, "harmless differences are no reason"
    assert message.count("→") >= 8


def test_what_is_harmless_is_named_and_what_can_be_mended_is(tmp_path: Path) -> None:
    save_bert(tmp_path / "a")
    save_bert(tmp_path / "b", hidden_dropout_prob=0.3, labels=["pos", "neg"])
    half = {name: value.half() for name, value in read_state(tmp_path / "b/model.safetensors").items()}
    older = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in half.items()}
    save_file({name.removeprefix("bert."): value for name, value in older.items()}, tmp_path / "b/model.safetensors")
    mends, notes = check_mergeable(describe("a", "b"), open_sources(list_sources(describe("a", "b")), tmp_path, 0))
    assert mends == {"a": Mend(), "b": Mend(label_order=(1, 0))}
    for words in ("stored as F16 instead of F32: cast to float32", "hidden_dropout_prob is 0.3", "ordered pos, neg"):
        assert any(words in note for note in notes), words
    assert len(notes) == 3


def test_a_label_order_of_the_recipe_goes_before_the_configurations(tmp_path: Path) -> None:
    save_bert(tmp_path / "a")
    save_bert(tmp_path / "b", labels=["no", "yes"])
    recipe = describe("a", "b")
    stated = replace(recipe, models=(recipe.models[0], replace(recipe.models[1], labels=("neg", "pos"))))
    assert check_mergeable(stated, open_sources(list_sources(stated), tmp_path, 0)) == ({"a": Mend(), "b": Mend()}, ())


def test_another_input_normalisation_is_to_be_folded_where_the_loaders_is_stated(tmp_path: Path) -> None:
    save_bert(tmp_path / "a")
    recipe = describe("a")
    stated = replace(
        recipe,
        models=(replace(recipe.models[0], normalise=HALF),),
        data=replace(recipe.data, normalise=NONE),
    )
    mends, (note,) = check_mergeable(stated, open_sources(list_sources(stated), tmp_path, 0))
    assert mends == {"a": Mend(trained=HALF, given=NONE)}
    assert "folded" in note


def test_where_the_loader_says_nothing_the_models_normalisation_is_named(tmp_path: Path) -> None:
    for name, size in (("a", 8), ("b", {"height": 8, "width": 8})):
        save_bert(tmp_path / name)
        usual = {"do_normalize": True, "image_mean": [0.5], "image_std": [0.5], "size": size}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(usual))
    mends, (note,) = check_mergeable(describe("a", "b"), open_sources(list_sources(describe("a", "b")), tmp_path, 0))
    assert set(mends.values()) == {Mend()}
    assert "assumed to be normalised by mean [0.5], std [0.5]" in note


def test_one_model_alone_and_one_file_twice_are_no_mismatch(tmp_path: Path) -> None:
    save_bert(tmp_path / "a")
    assert check_mergeable(describe("a"), open_sources(list_sources(describe("a")), tmp_path, 0)) == ({"a": Mend()}, ())
    twice = describe("a", "a")
    twice = replace(twice, models=(twice.models[0], replace(twice.models[1], name="b")))
    mends, notes = check_mergeable(twice, open_sources(list_sources(twice), tmp_path, 0))
    assert set(mends.values()) == {Mend()}
    assert notes == ("b against a: both are the same file: merging them changes nothing",)


def test_a_sentencepiece_vocabulary_and_a_tokenizer_json_are_compared(tmp_path: Path) -> None:
    for name, text in (("a", b"1"), ("b", b"2")):
        save_bert(tmp_path / name)
        (tmp_path / name / "vocab.txt").unlink()
        (tmp_path / name / "tokenizer.model").write_bytes(text)
        tokens = [["<unk>", 0.0], [text.decode(), -1.0]]
        whole = {"model": {"vocab": tokens, "merges": [text.decode()]}, "added_tokens": [{"id": 2, "content": "<s>"}]}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(MergeMismatch) as caught:
        check_mergeable(describe("a", "b"), open_sources(list_sources(describe("a", "b")), tmp_path, 0))
    message = str(caught.value)
    assert "vocabulary of 3 tokens instead of 3: missing 1; extra 2" in message
    assert "tokenizer.model is" in message
    assert "merges is" in message


def test_a_configuration_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    save_bert(tmp_path / "a")
    (tmp_path / "a/tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is not valid JSON"):
        check_mergeable(describe("a"), open_sources(list_sources(describe("a")), tmp_path, 0))


def write_hollow(path: Path, rows: int) -> None:
    """A checkpoint of gigabytes that takes no room: its header, and a hole where the tensor would be."""
    size = 4 * rows * 1024
    header = json.dumps({"w": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + size)


class HeaderOnly:
    """A safetensors file that refuses to give a tensor."""

    def __init__(self, path: Path, framework: str) -> None:
        self.file: Any = safetensors.safe_open(path, framework=framework)

    def __enter__(self) -> Self:
        self.file.__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        self.file.__exit__(*problem)

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def get_slice(self, name: str) -> SimpleNamespace:
        found = self.file.get_slice(name)
        return SimpleNamespace(get_shape=found.get_shape, get_dtype=found.get_dtype)


def test_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "safe_open", HeaderOnly)
    (tmp_path / "net.py").write_text("def make() -> None: ...\n")
    for name, rows in (("a", 1_000_000), ("b", 1_000_001)):  # 4 GB each
        write_hollow(tmp_path / f"{name}.safetensors", rows)
    sources = tuple(Source(name=name, factory="net.py:make", weights=f"{name}.safetensors") for name in "ab")
    with pytest.raises(MergeMismatch, match=r"w: shape \[1000001, 1024\] instead of \[1000000, 1024\]"):
        check_mergeable(
            replace(RECIPE, models=sources), open_sources(list_sources(replace(RECIPE, models=sources)), tmp_path, 0)
        )
    with pytest.raises(AttributeError, match="get_tensor"):
        refuse_broken(tmp_path / "a.safetensors")  # which does read, and could not here


def test_a_model_that_is_trained_on_the_spot_is_described_by_its_module(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\n\ndef make():\n    return nn.BatchNorm1d(3)\n")
    source = Source(name="a", factory="net.py:make", train="net.py:train", labels=("x", "y", "z"))
    facts = gather_facts(OpenedSource(source, tmp_path, 0))
    assert facts.tensors["weight"] == TensorHeader((3,), "F32")
    assert facts.tensors["num_batches_tracked"] == TensorHeader((), "I64")
    assert facts.labels == ("x", "y", "z")
    save_file({"weight": torch.ones(3)}, tmp_path / "b.safetensors")
    written = gather_facts(OpenedSource(Source(name="b", factory="net.py:make", weights="b.safetensors"), tmp_path, 0))
    assert written.tensors == {"weight": facts.tensors["weight"]}
