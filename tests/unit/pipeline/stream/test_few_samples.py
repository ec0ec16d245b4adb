from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from make.decoders import VOCABULARY, make_decoder, save_sharded
from rankship_pipeline.evaluate.calibrate import collect_halves
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.decompose import decompose_eigen, make_metric
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.layers import as_matrix, find_layers, get_layer
from rankship_pipeline.ranks.losses import list_doubts
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.stream.choice import StreamChoice
from rankship_pipeline.stream.compress import allocate_stream, analyse_stream

TOKENS = torch.randint(0, VOCABULARY, (20, 17), generator=torch.Generator().manual_seed(1))
RANKS = RankChoice(step=4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharded(make_decoder("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("samples", [1, 2, 5, 20])
def test_a_streamed_gram_is_shrunk_as_in_memory(tmp_path: Path, llama: Path, samples: int) -> None:
    tokens = TOKENS[:samples]
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    wrapped = ByPosition(model, ("input_ids",)).eval()
    layers = find_layers(wrapped, exclude=("*embed_tokens", "*lm_head"))
    halves = collect_halves(collect_grams, wrapped, (tokens,), layers)
    ways = [StreamChoice(whitening=name, chunk_tokens=60) for name in ("eigen", "swift")]
    eigen, swift = (analyse_stream(llama, tokens, tmp_path, choice) for choice in ways)
    for layer in layers:
        name = layer.name.removeprefix("model.")
        metric = make_metric(halves[layer.name], None, samples)
        expected = decompose_eigen(as_matrix(get_layer(wrapped, layer.name)), metric.gram).energy.numpy()
        assert metric.evidence is not None
        for streamed in (eigen,) if name.endswith("down_proj") else (eigen, swift):  # by its outputs: see test_shrink
            np.testing.assert_allclose(streamed.read_energy(name), expected, rtol=0, atol=1e-6 * expected.sum())
            assert streamed.read_shrinkage(name) == pytest.approx(metric.evidence.intensity, abs=1e-4)
        if samples == 1:
            assert swift.read_shrinkage(name) == 1


def test_few_samples_are_said_and_not_taken_for_all(tmp_path: Path, llama: Path) -> None:
    choices = (StreamChoice(chunk_tokens=60, shrink=shrink) for shrink in (True, False))
    few, raw = (allocate_stream(analyse_stream(llama, TOKENS[:1], tmp_path, one), 27_000, RANKS) for one in choices)
    (doubt,) = list_doubts(few)
    assert doubt.startswith("1 calibration samples are few (0.011 per column of the widest layer): 21 of 21 layers")
    assert not list(list_doubts(raw))
    assert raw.predicted_error < few.predicted_error / 2  # 17 positions say nothing of the other columns
    assert few.calibration_samples == raw.calibration_samples == 1


def test_halves_that_agree_are_believed(tmp_path: Path, llama: Path) -> None:
    same = analyse_stream(llama, TOKENS[:1].repeat(8, 1), tmp_path, StreamChoice())
    assert {same.read_shrinkage(layer.name) for layer in same.layers} == {0.0}  # two halves that agree


def test_a_plain_svd_asks_no_samples(tmp_path: Path, llama: Path) -> None:
    streamed = analyse_stream(llama, TOKENS, tmp_path, StreamChoice(whitening="plain"))
    plan = allocate_stream(streamed, 27_000, RANKS)
    assert plan.calibration_samples is None
    assert {one.shrinkage for one in plan.layers} == {None}
    name = streamed.layers[0].name
    weight = next(
        state[f"{name}.weight"] for state in map(load_file, llama.glob("*.safetensors")) if f"{name}.weight" in state
    )
    np.testing.assert_allclose(
        streamed.read_energy(name), torch.linalg.svdvals(weight.double()).square().numpy(), rtol=1e-6
    )
