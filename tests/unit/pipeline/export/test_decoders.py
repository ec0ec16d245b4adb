"""What cannot be exported with a cache is refused before any work."""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from make.generating import GENERATION, make_generating
from rankship_pipeline.export.decoders import write_decoder
from rankship_pipeline.export.decoders.bundles import write_bundle
from rankship_pipeline.foundation.errors import InputError, UnsupportedOp
from rankship_pipeline.foundation.generation import Generation


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        (replace(GENERATION, context=65), "places for 64 tokens, context is 65"),
        (replace(GENERATION, vocabulary=51), "a vocabulary of 50, not of 51"),
        (replace(GENERATION, ends=(50,)), "token 50"),
        (replace(GENERATION, begin=-1), "token -1"),
    ],
)
def test_a_generation_must_fit_the_model(generation: Generation, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_decoder(make_generating("llama"), "onnx", tmp_path / "model.onnx", generation)


def test_a_model_must_be_a_language_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Linear is no language model of transformers"):
        write_decoder(nn.Linear(2, 2), "onnx", tmp_path / "model.onnx", GENERATION)


def test_angles_that_depend_on_a_text_are_refused(tmp_path: Path) -> None:
    module = make_generating("llama")
    config: Any = module.model.config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(UnsupportedOp, match="dynamic"):
        write_decoder(module, "onnx", tmp_path / "model.onnx", GENERATION)


def test_layers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    module = make_generating("qwen3")
    config: Any = module.model.config
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(UnsupportedOp, match="layers of linear_attention"):
        write_decoder(module, "onnx", tmp_path / "model.onnx", GENERATION)


def test_a_bundle_names_what_is_in_the_file(tmp_path: Path) -> None:
    """onnxruntime-genai's configuration, as its own builder writes it."""
    module = make_generating("qwen2")
    written = write_bundle(module, "onnx", tmp_path / "model.onnx", GENERATION)
    assert written == tmp_path / "genai_config.json"
    told = json.loads(written.read_text())
    decoder = told["model"]["decoder"]
    assert (decoder["filename"], decoder["head_size"], decoder["num_key_value_heads"]) == ("model.onnx", 8, 2)
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert decoder["outputs"]["present_value_names"] == "present.%d.value"
    assert told["model"]["eos_token_id"] == [2, 3]
    assert told["search"]["max_length"] == GENERATION.context


def test_only_formats_with_runners_of_their_own_get_a_bundle(tmp_path: Path) -> None:
    module = make_generating("qwen2")
    assert write_bundle(module, "executorch", tmp_path / "model.pte", GENERATION) is None
    assert write_bundle(module, "tflite", tmp_path / "model.tflite", GENERATION, tmp_path) is None


def test_a_litertlm_bundle_holds_file_and_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("litert_lm_builder")
    file, tokenizer = tmp_path / "model.tflite", tmp_path / "tokenizer.json"
    file.write_bytes(b"TFL3" * 8)
    tokenizer.write_text('{"version": "1.0"}')
    written = write_bundle(make_generating("qwen2"), "tflite", file, GENERATION, tmp_path)
    assert written == tmp_path / "model.litertlm"
    content = written.read_bytes()
    assert content.startswith(b"LITERTLM")
    assert file.read_bytes() in content
    assert zlib.compress(tokenizer.read_bytes()) in content
