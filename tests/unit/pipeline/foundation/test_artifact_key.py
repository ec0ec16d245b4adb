"""What an artifact is called: nothing usual is said, nothing else is left out."""

from dataclasses import replace

import pytest

from make.artifacts import CANARY, COMPRESSED, DENSE
from rankship_pipeline.foundation.artifact_key import DECODE, WHOLE, ArtifactKey, head_of, prefill_of
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError

INT8 = replace(COMPRESSED, precision="int8")
HEAD = replace(DENSE, part=head_of("prefill"))  # a task may be called like any other part


@pytest.mark.parametrize(
    ("key", "title", "model", "heading"),
    [
        (DENSE, "dense onnx", "dense", "onnx dense"),
        (INT8, "compressed onnx, int8", "compressed, int8", "onnx compressed, int8"),
        (HEAD, "dense onnx, head of prefill", "dense, head of prefill", "onnx dense, head of prefill"),
        (replace(INT8, part="decode"), "compressed onnx, int8, decode", "compressed, int8, decode", None),
    ],
)
def test_only_what_is_not_usual_is_told(key: ArtifactKey, title: str, model: str, heading: str | None) -> None:
    assert (key.title, key.model) == (title, model)
    assert heading in {None, key.heading}


def test_lists_go_by_format_dense_first_the_usual_before_the_rest() -> None:
    tflite = replace(DENSE, format="tflite")
    listed = sorted([tflite, INT8, CANARY, HEAD, COMPRESSED, DENSE], key=lambda key: key.order)
    assert listed == [DENSE, HEAD, COMPRESSED, INT8, CANARY, tflite]


def test_a_part_is_a_tasks_head_or_none() -> None:
    assert (HEAD.task, HEAD.part) == ("prefill", "head of prefill")
    assert [replace(DENSE, part=part).task for part in (WHOLE, "prefill", "decode")] == [None] * 3


def test_a_file_that_generates_is_timed_by_phase_prompts_by_their_length_then_a_token() -> None:
    parts = [replace(INT8, part=part) for part in (prefill_of(16), prefill_of(128), DECODE)]
    assert sorted([parts[2], parts[1], parts[0]], key=lambda key: key.order) == parts
    assert [(one.phase, one.prompt_tokens) for one in parts] == [("prefill", 16), ("prefill", 128), ("decode", None)]
    assert {one.exported for one in parts} == {INT8}
    assert (HEAD.phase, HEAD.exported) == (None, HEAD)


def test_the_dense_counterpart_is_run_in_the_same_way() -> None:
    assert replace(INT8, format="tflite", part="decode").dense == replace(DENSE, format="tflite", part="decode")


def test_a_precision_that_is_none_is_refused() -> None:
    assert decode(ArtifactKey, '{"variant":"dense","format":"onnx"}', where="here") == DENSE
    with pytest.raises(InputError, match="here: precision"):
        decode(ArtifactKey, encode(DENSE).replace("float32", "float31"), where="here")
