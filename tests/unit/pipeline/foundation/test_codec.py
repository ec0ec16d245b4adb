import hashlib
import json
from typing import Any, TypeVar, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import decode, decode_text, digest, encode, parse_toml
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.quality import ACCURACY, Score
from rankship_pipeline.foundation.records import (
    Alternative,
    Artifact,
    Build,
    Dimension,
    Factors,
    Form,
    LayerRank,
    RankPlan,
    TensorSpec,
    Verified,
)

T = TypeVar("T")

numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**60)
words = st.text(max_size=8)
maps = st.dictionaries(words, words, max_size=3)


def rows(strategy: st.SearchStrategy[T], most: int = 3) -> st.SearchStrategy[tuple[T, ...]]:
    return st.lists(strategy, max_size=most).map(tuple)


specs = st.builds(TensorSpec, name=words, shape=rows(st.one_of(counts, st.from_type(Dimension))), dtype=words)
artifacts = st.builds(
    Artifact,
    key=st.from_type(ArtifactKey),
    file=words,
    size_bytes=counts,
    sha256=words,
    inputs=rows(specs),
    outputs=rows(specs),
    parameters=counts,
    factored_layers=rows(words),
    recipe_sha256=words,
    source_sha256=maps,
    toolchain=maps,
)
verified = st.builds(
    Verified,
    artifact_sha256=words,
    key=st.from_type(ArtifactKey),
    runtime=words,
    runtime_version=words,
    samples=counts,
    max_relative_error=numbers,
    min_cosine=numbers,
    top1_agreement=numbers,
)
factors = st.builds(Factors, form=st.sampled_from(get_args(Form)), rank=counts, input_rank=st.none() | counts)
layers = st.builds(
    LayerRank,
    name=words,
    rows=counts,
    columns=counts,
    factors=st.none() | factors,
    operators=rows(st.tuples(counts, counts)),
    dense_parameters=counts,
    chosen_parameters=counts,
    relative_error=numbers,
    interference=st.none() | numbers,
)
plans = st.builds(
    RankPlan,
    method=words,
    layers=rows(layers),
    fixed_parameters=counts,
    total_parameters=counts,
    unit=st.sampled_from(["parameters", "flops", "ns", "uj"]),
    total_cost=counts,
    budget_cost=counts,
    predicted_error=numbers,
)
accuracies = st.builds(
    Score,
    stage=words,
    samples=counts,
    value=numbers,
    correct=st.none() | counts,
    low=st.none() | numbers,
    high=st.none() | numbers,
    cross_entropy=st.none() | numbers,
    also=st.dictionaries(words, numbers, max_size=2),
)
builds = st.builds(
    Build,
    recipe=words,
    recipe_sha256=words,
    artifacts=rows(artifacts, 2),
    plan=plans,
    accuracies=rows(accuracies),
    alternatives=rows(st.builds(Alternative, method=words, plan=plans, accuracy=accuracies), 2),
    dense_parameters=counts,
    batchnorm_reestimated=rows(words),
)

SPEC = TensorSpec(name="x", shape=(1, 2), dtype="float32")


@settings(max_examples=150)
@given(plans | artifacts | verified | builds)
def test_a_record_comes_back_as_it_went(record: RankPlan | Artifact | Verified | Build) -> None:
    text = encode(record)
    again = decode(type(record), text, where="test")
    assert again == record
    assert encode(again) == text


def test_json_is_canonical() -> None:
    assert encode(SPEC) == '{"classes_axis":null,"dtype":"float32","name":"x","shape":[1,2]}'
    assert encode({"b": 1, "a": "é", "c": (1, None)}) == '{"a":"é","b":1,"c":[1,null]}'


def test_the_order_of_keys_does_not_change_a_hash() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_hash_is_sha256_of_the_canonical_json() -> None:
    assert (
        digest(SPEC) == hashlib.sha256(b'{"classes_axis":null,"dtype":"float32","name":"x","shape":[1,2]}').hexdigest()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_in_records_and_in_plain_values(value: float) -> None:
    accuracy = Score(stage="s", samples=1, value=1.0, correct=1, low=value, high=1.0)
    for thing in (accuracy, {"a": value}, [value], {"a": {"b": (value,)}}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            encode(thing)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"nam": "x"}, "unknown key 'nam', did you mean 'name'"),
        ({"shape": [1, "2"]}, "shape.1.int: .*integer.* \\(got '2'\\)"),
        ({"shape": [1, 2.5]}, "shape.1.int: .*integer"),
        ({"dtype": None}, "dtype: .*string.* \\(got None\\)"),
    ],
)
def test_decoding_is_strict_and_names_the_place(change: dict[str, Any], complaint: str) -> None:
    table = {**json.loads(encode(SPEC)), **change}
    with pytest.raises(InputError, match=f"^here.json: {complaint}"):
        decode(TensorSpec, json.dumps(table), where="here.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"name":"x"}'])
def test_text_that_is_no_record_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match=r"^here\.json: "):
        decode(TensorSpec, text, where="here.json")


def test_a_long_wrong_value_is_shortened() -> None:
    with pytest.raises(InputError) as caught:
        decode(TensorSpec, json.dumps({"name": ["y" * 1000], "shape": [], "dtype": ""}), where="here")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(newline: str) -> None:
    text = newline.join(['name = "größe"', "[merge]", 'method = "average"', ""])
    data = b"\xef\xbb\xbf" + text.encode()
    expected = {"name": "größe", "merge": {"method": "average"}}
    assert parse_toml(decode_text(data, "x.toml"), "x.toml") == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_characters_are_refused_with_what_to_do(encoding: str) -> None:
    with pytest.raises(
        InputError, match=r"^x\.toml is not valid TOML: it is UTF-16 or UTF-32, expected UTF-8\n"
    ) as caught:
        decode_text('name = "a"'.encode(encoding), "x.toml")
    assert "save it as UTF-8" in caught.value.hint


def test_another_encoding_is_refused_with_the_line() -> None:
    with pytest.raises(InputError, match="the byte 0xfc in line 2 is not UTF-8"):
        decode_text('a = "1"\nb = "für"'.encode("latin-1"), "x.toml")


def test_toml_nested_without_end_is_refused() -> None:
    with pytest.raises(InputError, match="nested too deeply"):
        parse_toml("a = " + "[" * 20_000, "x.toml")


def test_a_score_of_release_0_1_is_an_accuracy() -> None:
    old = b'{"stage":"merged","samples":200,"correct":150,"low":0.68,"high":0.8,"cross_entropy":0.7}'
    score = decode(Score, old, where="accuracy.json")
    assert (score.value, score.measure, score.show()) == (0.75, ACCURACY, "75.0 %")
