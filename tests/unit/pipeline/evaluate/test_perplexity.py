import math
from typing import Any

import pytest
import scipy.stats
import torch
import transformers
from torch import Tensor, nn

from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.evaluate.perplexity import measure_labelled_perplexity, measure_perplexity
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import make_weights
from rankship_pipeline.factors.rebuild import fill_factors, rebuild
from rankship_pipeline.foundation.errors import InputError, MeasurementError
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.layers import Layer, as_matrix, find_layers, get_layer

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PROJECTIONS = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def make(kind: str, **settings: object) -> ByPosition:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | settings), attn_implementation="eager")
    if kind == "Qwen3":
        config.head_dim = 4
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)  # far from uniform predictions
        elif name.endswith("bias"):
            nn.init.normal_(parameter)
    return ByPosition(model, ("input_ids",)).eval()


def make_gpt2() -> ByPosition:
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return ByPosition(model, ("input_ids",)).eval()


@pytest.fixture(scope="module")
def llama() -> ByPosition:
    return make("Llama")


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(0, VOCABULARY, (47,), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def score_one_by_one(model: nn.Module, tokens: Tensor, length: int, stride: int) -> list[float]:
    """Each token's nats, the model run anew for every single one on exactly the context that it should have."""
    found = []
    for target in range(1, len(tokens)):
        begin = 0
        while begin + length < target:  # the first window whose last prediction reaches the target
            begin += stride
        logits = model(tokens[None, begin:target])[0, -1].double()
        found.append(float(logits.logsumexp(0) - logits[tokens[target]]))
    return found


@pytest.mark.parametrize(
    ("length", "stride"), [(8, 8), (8, 3), (8, 1), (1, 1), (46, 46), (46, 5), (45, 45), (23, 23), (47, 9), (60, 60)]
)
@pytest.mark.parametrize("batch", [1, 4])
def test_perplexity_is_that_of_scoring_one_token_at_a_time(
    llama: ByPosition, text: Tensor, length: int, stride: int, batch: int
) -> None:
    expected = score_one_by_one(llama, text, length, stride)
    found = measure_perplexity(llama, text, length=length, stride=stride, batch=batch)
    assert found.scored_tokens == len(text) - 1 == len(expected)
    assert found.mean_nll_nats == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.mean_nll_nats))
    assert (found.length_tokens, found.stride_tokens) == (length, stride)


@torch.inference_mode()
def test_windows_are_those_of_the_hugging_face_documentation(llama: ByPosition, text: Tensor) -> None:
    length, stride, ends, total = 10, 4, 0, 0.0
    for begin in range(0, len(text), stride):  # the loop of the page, max_length = length + 1
        end = min(begin + length + 1, len(text))
        ids = text[None, begin:end]
        targets = ids.clone()
        targets[:, : -(end - ends)] = -100
        counted = int((targets[:, 1:] != -100).sum())
        total += float(llama.model(input_ids=ids, labels=targets).loss) * counted
        ends = end
        if end == len(text):
            break
    found = measure_perplexity(llama, text, length=length, stride=stride)
    assert found.mean_nll_nats == pytest.approx(total / (len(text) - 1), rel=1e-5)


@pytest.mark.parametrize("tokens", range(2, 20))
@pytest.mark.parametrize(("length", "stride"), [(4, 4), (4, 1), (5, 3), (1, 1), (30, 7)])
def test_every_token_but_the_first_is_scored_once(tokens: int, length: int, stride: int) -> None:
    found = measure_perplexity(Uniform(), torch.arange(tokens), length=length, stride=stride, batch=2)
    assert found.scored_tokens == tokens - 1
    assert found.perplexity == pytest.approx(VOCABULARY)


class Uniform(nn.Module):
    """All tokens alike; `widest` is the largest batch that was ever asked for."""

    widest = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.widest = max(self.widest, ids.numel())
        return torch.zeros(*ids.shape, VOCABULARY)


def test_only_one_batch_is_held_at_once() -> None:
    model = Uniform()
    measure_perplexity(model, torch.zeros(5000, dtype=torch.int64), length=10, stride=10, batch=3)
    assert model.widest == 30


class Skilled(nn.Module):
    """Token 1 has probability 3/4, whatever came before."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tensor([0.0, math.log(3.0)]).expand(*ids.shape, 2)


def test_the_interval_of_equal_blocks_is_students() -> None:
    tokens = (torch.rand(101, generator=torch.Generator().manual_seed(4)) < 0.75).long()
    nats = torch.where(tokens[1:] == 1, math.log(4 / 3), math.log(4)).double().reshape(10, 10).mean(1).numpy()
    low, high = scipy.stats.t.interval(0.95, 9, loc=nats.mean(), scale=scipy.stats.sem(nats))
    found = measure_perplexity(Skilled(), tokens, length=10, stride=10)
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-6)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator, held, trials = torch.Generator().manual_seed(3), 0, 2000
    truth = 4 * 3**-0.75  # exp of the entropy
    for _ in range(trials):
        tokens = (torch.rand(401, generator=generator) < 0.75).long()
        found = measure_perplexity(Skilled(), tokens, length=20, stride=20, batch=20)
        assert found.blocks == 20
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert held / trials == pytest.approx(0.95, abs=0.025)  # five standard errors of 2000 trials


def test_one_block_has_no_interval(llama: ByPosition, text: Tensor) -> None:
    found = measure_perplexity(llama, text, length=60, stride=1)
    assert (found.blocks, found.low, found.high) == (1, None, None)


def test_windows_that_overlap_are_one_block(llama: ByPosition, text: Tensor) -> None:
    assert measure_perplexity(llama, text, length=8, stride=2).blocks == math.ceil((1 + math.ceil(38 / 2)) / 4)


def test_documents_are_scored_apart_and_padding_never(llama: ByPosition, text: Tensor) -> None:
    documents = [text[:20], text[20:33], text[33:]]
    inputs, labels = torch.zeros(4, 19, dtype=torch.int64), torch.full((4, 19), -100)
    for row, document in enumerate(documents):  # the fourth is empty
        inputs[row, : len(document) - 1], labels[row, : len(document) - 1] = document[:-1], document[1:]
    expected = [nats for document in documents for nats in score_one_by_one(llama, document, 20, 20)]
    found = measure_labelled_perplexity(llama, inputs, labels, batch=2)
    assert found.scored_tokens == len(expected) == 44
    assert found.mean_nll_nats == pytest.approx(sum(expected) / 44, rel=1e-5)
    assert (found.length_tokens, found.stride_tokens, found.blocks) == (19, None, 3)
    inputs[labels == -100] = 7  # whatever stands there
    assert measure_labelled_perplexity(llama, inputs, labels).mean_nll_nats == pytest.approx(found.mean_nll_nats)


def test_dropout_is_off_while_measuring_and_on_again_after(text: Tensor) -> None:
    model = make_gpt2()
    expected = measure_perplexity(model, text, length=16, stride=8)
    model.train()
    model.model.get_submodule("transformer.h.0").eval()
    assert measure_perplexity(model, text, length=16, stride=8) == expected
    assert model.training
    assert not model.model.get_submodule("transformer.h.0").training


@pytest.mark.parametrize(
    ("tokens", "length", "stride"),
    [([1], 4, 4), ([[1, 2]], 4, 4), ([0.5, 1.0], 4, 4), ([1, 2, 3], 4, 5), ([1, 2, 3], 4, 0), ([1, 2, 3], 0, 0)],
)
def test_what_cannot_be_measured_is_an_input_error(tokens: list[Any], length: int, stride: int) -> None:
    with pytest.raises(InputError):
        measure_perplexity(Uniform(), torch.tensor(tokens), length=length, stride=stride)


def test_documents_without_a_label_are_an_input_error() -> None:
    with pytest.raises(InputError, match="nothing can be scored"):
        measure_labelled_perplexity(Uniform(), torch.zeros(2, 3).long(), torch.full((2, 3), -100))


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    class Wrong(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.tensor([2000.0, 0.0]).expand(*ids.shape, 2)

    found = measure_perplexity(Wrong(), torch.ones(9, dtype=torch.int64), length=2, stride=2)
    assert (found.mean_nll_nats, found.perplexity, found.high) == (2000, math.inf, math.inf)


def test_nan_is_no_perplexity(text: Tensor) -> None:
    class Broken(Uniform):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * float("nan")

    with pytest.raises(MeasurementError, match="nan"):
        measure_perplexity(Broken(), text, length=8, stride=8)


@torch.inference_mode()
def test_gpt2s_layers_at_their_full_rank_compute_the_same(text: Tensor) -> None:
    model = make_gpt2()
    layers = tuple(layer for layer in find_layers(model) if layer.kind == "linear")  # the head is tied
    assert len(layers) == 2 * 4
    factored = factor(model, layers, {layer.name: min(layer.rows, layer.columns) for layer in layers})
    torch.testing.assert_close(factored(text[None]), model(text[None]), rtol=1e-4, atol=1e-4)


def factor(model: nn.Module, layers: tuple[Layer, ...], ranks: dict[str, int]) -> nn.Module:
    plan = {name: Factors(rank=rank) for name, rank in ranks.items()}
    factored = rebuild(model, plan)
    for layer in layers:
        weight = as_matrix(get_layer(model, layer.name))
        parts = make_weights(Decomposition(layer, weight, Metric(), "plain"), plan[layer.name])
        fill_factors(factored.get_submodule(layer.name), parts)
    return factored


@torch.inference_mode()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_a_language_model_is_found_factored_and_still_speaks(kind: str, tied: bool, text: Tensor) -> None:  # noqa: FBT001
    model = make(kind, tie_word_embeddings=tied)
    linear = tuple(layer for layer in find_layers(model) if layer.kind == "linear")
    found = {layer.name: layer for layer in linear}
    projections = {f"model.model.layers.{block}.{name}" for block in range(2) for name in PROJECTIONS}
    assert found.keys() == projections | (set() if tied else {"model.lm_head"})
    (words,) = (layer for layer in find_layers(model) if layer.kind == "embedding")
    assert [layer.name for layer in words.tied] == (["model.lm_head"] if tied else [])
    assert found["model.model.layers.0.self_attn.k_proj"].rows == 8  # two of four heads: grouped queries
    assert all(len(grams) == found[name].columns for name, grams in collect_grams(model, (text[None],), linear).items())
    full = factor(model, linear, {name: min(layer.rows, layer.columns) for name, layer in found.items()})
    torch.testing.assert_close(full(text[None]), model(text[None]), rtol=1e-3, atol=1e-3)
    small = factor(model, linear, dict.fromkeys(found, 2))
    assert small(text[None]).isfinite().all()
    measured = [measure_perplexity(one, text, length=16, stride=16).mean_nll_nats for one in (model, full, small)]
    assert measured[0] == pytest.approx(measured[1], abs=1e-4)
    assert measured[0] != pytest.approx(measured[2], abs=1e-2)
    head, table = small.get_submodule("model.lm_head"), small.get_submodule("model.model.embed_tokens")
    assert (getattr(head, "weight", None) is table.weight) == tied
