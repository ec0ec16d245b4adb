"""Call sites of a language model in each phase: as many rows as tokens, and one row of the head."""

import pytest

from make.decoders import VOCABULARY, make_decoder
from rankship_pipeline.flow.phases import find_phase_sites
from rankship_pipeline.foundation.artifact_key import DECODE, ArtifactKey, prefill_of
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.ranks.call_sites import Site

UP, HEAD, EMBEDDING = "model.model.layers.0.mlp.up_proj", "model.lm_head", "model.model.embed_tokens"


def find(name: str, part: str, format_: Format = "onnx", context: int = 40) -> dict[str, tuple[Site, ...]]:
    module = ByPosition(make_decoder(name), ("input_ids",)).eval()
    key = ArtifactKey(variant="dense", format=format_, part=part)
    return find_phase_sites(module, find_layers(module), key, context)


@pytest.mark.parametrize(("part", "rows"), [(prefill_of(9), 9), (DECODE, 1)])
def test_every_token_is_a_row_and_only_the_last_is_one_of_the_head(part: str, rows: int) -> None:
    sites = find("llama", part)
    assert [one.input_shape for one in sites[UP]] == [(1, rows, 32)]
    assert [one.input_shape for one in sites[HEAD]] == [(1, 1, 32)]
    assert sites[EMBEDDING] == (Site(kind="embedding", rows=32, columns=VOCABULARY, bias=False, input_shape=(1, rows)),)


def test_a_tied_head_is_a_call_of_the_embedding() -> None:
    sites = find("qwen2", prefill_of(9))
    assert [(one.kind, one.input_shape) for one in sites[EMBEDDING]] == [("embedding", (1, 9)), ("linear", (1, 1, 32))]


def test_a_layer_has_a_site_for_every_run_of_a_tflite_file() -> None:
    sites = find("llama", prefill_of(20), "tflite")
    assert [one.input_shape[1] for one in sites[UP]] == [16, 16, 1]
    assert [one.input_shape for one in sites[HEAD]] == [(1, 1, 32)], "no prefill gives logits"
    assert [one.input_shape[1] for one in find("llama", DECODE, "tflite")[UP]] == [1]
