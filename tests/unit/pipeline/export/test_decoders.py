"""What cannot be exported with a cache is refused before any work."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from make.generating import GENERATION, make_generating
from rankship_pipeline.export.decoders import write_decoder
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
