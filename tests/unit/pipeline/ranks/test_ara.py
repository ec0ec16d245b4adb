import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from rankship_pipeline.evaluate.accuracy import IGNORED, measure_divergence, predict
from rankship_pipeline.evaluate.calibrate import collect_grams
from rankship_pipeline.factors.decompose import Spectrum, decompose_eigen, decompose_plain, truncate
from rankship_pipeline.factors.forms import Candidate
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Layer, as_matrix, find_layers, get_layer
from rankship_pipeline.ranks import ara
from rankship_pipeline.ranks.allocators import allocate_uniform, total_cost
from rankship_pipeline.ranks.ara import AraChoice, Mask, Masked, Task, finalise, make_mask, train_ratios
from rankship_pipeline.ranks.stats import Choices, LayerStats
from rankship_pipeline.recipe.choices import RankChoice

ORIGINAL, REPAIRED = AraChoice(repaired=False), AraChoice(repaired=True)
FAST = AraChoice(steps=100, learning_rate=3e-2, batch=16)
CALIBRATION = 256


def ignore_tick(_done: int, _total: int) -> None:
    """Show nothing."""


def make_stats(layer: Layer, energy: Tensor, step: int = 1) -> LayerStats:
    total = float(energy.sum())
    candidates = tuple(
        Candidate(Factors(rank=k), layer.count_factored(k), float(energy[k:].sum()) / total)
        for k in range(step, min(layer.rows, layer.columns) + 1, step)
        if layer.count_factored(k) < layer.parameters
    )
    return LayerStats(layer=layer, plain=energy.numpy(), energy=energy.numpy(), candidates=candidates)


def make_spectrum(rows: int, columns: int, seed: int = 0) -> Spectrum:
    generator = torch.Generator().manual_seed(seed)
    return decompose_plain(torch.randn(rows, columns, generator=generator, dtype=torch.float64), None)


def with_logits(mask: Mask, logits: Tensor) -> Mask:
    return replace(mask, logits=logits.clone().requires_grad_())


def with_ratio(mask: Mask, ratio: float) -> Mask:
    return replace(mask, logits=ara.start_logits(mask.c, ratio / mask.stretch).requires_grad_())


def find_gradient(value: Tensor, mask: Mask) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(mask.logits)
    (gradient,) = torch.autograd.grad(value, mask.logits, allow_unused=True)
    return torch.zeros_like(mask.logits) if gradient is None else gradient


shapes = st.tuples(st.integers(3, 40), st.integers(3, 40))


@st.composite
def logits_of_any_kind(draw: st.DrawFn) -> Tensor:
    """From all alike to nearly one candidate alone (101,)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.randn(101, generator=generator, dtype=torch.float64) * draw(
        st.sampled_from([0.0, 0.1, 1.0, 8.0, 50.0])
    )


# --- the mask ------------------------------------------------------------------------------------------------------


@given(shape=shapes, logits=logits_of_any_kind())
def test_the_soft_mask_falls_for_every_distribution(shape: tuple[int, int], logits: Tensor) -> None:
    mask = with_logits(make_mask(make_spectrum(*shape), 0.5, REPAIRED), logits)
    p = (mask.logits.softmax(0) @ mask.M).detach()
    assert bool((p.diff() <= 1e-12).all())
    assert 0 <= float(p.min()) <= float(p.max()) <= 1 + 1e-12


@given(shape=shapes, logits=logits_of_any_kind(), choice=st.sampled_from([ORIGINAL, REPAIRED]))
def test_the_hard_mask_keeps_the_first_components_and_as_many_as_the_retention_says(
    shape: tuple[int, int], logits: Tensor, choice: AraChoice
) -> None:
    mask = with_logits(make_mask(make_spectrum(*shape), 0.5, choice), logits)
    K = mask.M.shape[1]
    r = float((logits.softmax(0) * torch.linspace(1, 0, 101, dtype=torch.float64)).sum())
    assume(abs(K * r % 1 - 0.5) > 1e-9)
    kept = round(K * r)
    torch.testing.assert_close(mask.draw().detach(), torch.tensor([1.0] * kept + [0.0] * (K - kept)).double())
    assert float(mask.find_ratio().detach()) == pytest.approx(mask.stretch * r)


@pytest.mark.parametrize("D", [7, 100])
@pytest.mark.parametrize("K", [1, 3, 29, 100])
def test_the_staircase_has_int_of_k_times_c_ones_in_each_row(K: int, D: int) -> None:
    M = ara.build_staircase(K, D)
    assert M.sum(1).tolist() == [int(K * (1 - Fraction(i, D))) for i in range(D + 1)]
    assert bool((M.diff(dim=1) <= 0).all())


@given(st.floats(1e-6, 1 - 1e-6), st.integers(2, 200))
def test_logits_start_at_the_target_exactly(t: float, D: int) -> None:
    c = torch.arange(D, -1, -1, dtype=torch.float64) / D
    logits = ara.start_logits(c, t)
    assert float(logits.softmax(0) @ c) == pytest.approx(t, rel=1e-9)
    assert len(set(logits[c >= t].tolist())) == 1
    assert bool((logits[c < t] == 0).all())


@pytest.mark.parametrize("choice", [ORIGINAL, REPAIRED], ids=["original", "repaired"])
@given(shape=shapes, kept=st.floats(0.02, 0.98))
def test_every_layer_starts_at_the_share_that_is_asked_for(
    shape: tuple[int, int], kept: float, choice: AraChoice
) -> None:
    mask = make_mask(make_spectrum(*shape), kept, choice)
    assert float(mask.find_ratio().detach()) == pytest.approx(kept, rel=1e-9)


def test_the_gradient_passes_the_hard_mask_as_if_it_were_soft_and_reaches_every_logit() -> None:
    mask = make_mask(make_spectrum(40, 40), 0.5, REPAIRED)
    worth = torch.linspace(1, 3, mask.M.shape[1], dtype=torch.float64)
    found = find_gradient(mask.draw() @ worth, mask)
    torch.testing.assert_close(found, find_gradient(mask.logits.softmax(0) @ mask.M @ worth, mask))
    assert bool((found != 0).all())


def test_the_published_mask_is_wider_than_a_heads_spectrum_and_the_repaired_one_is_not() -> None:
    spectrum = make_spectrum(10, 64)  # k* = 640/74 = 8.65
    original, repaired = make_mask(spectrum, 0.5, ORIGINAL), make_mask(spectrum, 0.5, REPAIRED)
    assert [mask.M.shape[1] for mask in (original, repaired)] == [11, 10]
    assert [mask.stretch for mask in (original, repaired)] == [1.2, pytest.approx(10 / (640 / 74))]
    assert original.errors[9:].tolist() == [pytest.approx(float(spectrum.sigma[9] / spectrum.sigma.norm())), 0, 0]
    x = torch.randn(5, 64)
    head = nn.Linear(64, 10).requires_grad_(requires_grad=False)
    for mask in (original, repaired):
        full = replace(mask, stretch=0.5)  # all components, and yet not dense
        full = with_logits(full, torch.tensor([50.0] + [0.0] * 100, dtype=torch.float64))
        y = Masked(head, decompose_plain(as_matrix(head), None), full, repaired=False)(x)
        torch.testing.assert_close(y, head(x))


def test_errors_are_relative_norms_of_what_is_cut_off() -> None:
    spectrum = make_spectrum(6, 9)
    weight = spectrum.U * spectrum.sigma @ spectrum.right
    for k, error in enumerate(ara.measure_errors(spectrum, 8).tolist()):
        A, B = truncate(spectrum, k)
        assert error == pytest.approx(float((weight - A @ B).norm() / weight.norm()), abs=1e-9)


def test_a_layer_of_zeros_has_no_error() -> None:
    spectrum = decompose_plain(torch.zeros(6, 9, dtype=torch.float64), None)
    assert ara.measure_errors(spectrum, 5).tolist() == [0] * 6


# --- the masked layer ----------------------------------------------------------------------------------------------

MODULES: list[tuple[nn.Module, Tensor]] = [
    (nn.Linear(12, 9), torch.randn(4, 12)),
    (nn.Linear(12, 9, bias=False), torch.randn(4, 5, 12)),
    (nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 6, 7)),
    (nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(0, 1), bias=False), torch.randn(2, 3, 6, 7)),
    (nn.Conv2d(3, 8, 3, padding="same", dilation=2), torch.randn(2, 3, 6, 7)),
    (nn.Conv2d(3, 8, 3), torch.randn(3, 6, 7)),  # a single image
    (nn.Embedding(20, 8), torch.tensor([[0, 3, 19], [7, 7, 1]])),
]


def make_masked(module: Any, ratio: float, *, repaired: bool) -> tuple[Masked, Spectrum]:  # noqa: ANN401
    module = copy.deepcopy(module).requires_grad_(requires_grad=False)
    spectrum = decompose_plain(as_matrix(module), None)
    mask = with_ratio(make_mask(spectrum, 0.5, AraChoice(repaired=repaired)), ratio)
    return Masked(module, spectrum, mask, repaired=repaired), spectrum


@pytest.mark.parametrize(("module", "x"), MODULES, ids=[str(module) for module, _ in MODULES])
def test_a_masked_layer_below_one_computes_its_truncated_self(module: Any, x: Tensor) -> None:  # noqa: ANN401
    masked, spectrum = make_masked(module, 0.6, repaired=True)
    cut = copy.deepcopy(module)
    A, B = truncate(spectrum, masked.mask.count_kept())
    cut.weight.data.copy_((A @ B).T if isinstance(module, nn.Embedding) else (A @ B).reshape(cut.weight.shape))
    y = masked(input=x)
    torch.testing.assert_close(y, cut(x), rtol=1e-4, atol=1e-5)
    assert bool((find_gradient(y.square().sum(), masked.mask) != 0).any())


@pytest.mark.parametrize("choice", [ORIGINAL, REPAIRED], ids=["original", "repaired"])
@pytest.mark.parametrize(("module", "x"), MODULES, ids=[str(module) for module, _ in MODULES])
def test_a_masked_layer_from_one_on_computes_its_dense_self(module: Any, x: Tensor, choice: AraChoice) -> None:  # noqa: ANN401
    masked, _ = make_masked(module, 1.05, repaired=choice.repaired)
    torch.testing.assert_close(masked(x), module(x))


def test_as_published_dense_is_absorbing_and_repaired_it_is_not() -> None:
    x = torch.randn(6, 12, requires_grad=True)
    gradients = {}
    for repaired in (False, True):
        masked, _ = make_masked(nn.Linear(12, 9), 1.05, repaired=repaired)
        size = ara.measure_size([masked.mask], masked.mask.parameters, repaired=repaired)
        assert float(size.detach()) == pytest.approx(1)
        task = find_gradient(masked(x).square().sum(), masked.mask)
        gradients[repaired] = (task, find_gradient(size, masked.mask))
    assert [bool((gradient == 0).all()) for gradient in gradients[False]] == [True, True]
    assert [bool((gradient != 0).all()) for gradient in gradients[True]] == [True, True]


def test_a_repaired_dense_layers_mask_learns_from_the_factors_and_its_input_from_the_weight() -> None:
    module = nn.Linear(12, 9)
    masked, spectrum = make_masked(module, 1.05, repaired=True)
    x = torch.randn(6, 12, requires_grad=True)
    upstream = torch.randn(6, 9)
    mask_gradient, x_gradient = torch.autograd.grad((masked(x) * upstream).sum(), [masked.mask.logits, x])
    torch.testing.assert_close(x_gradient, upstream @ module.weight.detach())
    W_u, W_v = (factor.float() for factor in truncate(spectrum, masked.mask.M.shape[1]))
    worth = ((x.detach() @ W_v.T) * (upstream @ W_u)).sum(0).double()  # what each component adds to the sum
    p = masked.mask.logits.softmax(0) @ masked.mask.M
    torch.testing.assert_close(mask_gradient, find_gradient(p @ worth, masked.mask), rtol=1e-4, atol=1e-6)


# --- losses --------------------------------------------------------------------------------------------------------


@given(shape=shapes, ratio=st.floats(0.05, 1.1), decay=st.floats(0.05, 1))
def test_guidance_fires_exactly_where_size_and_error_exceed_one(
    shape: tuple[int, int], ratio: float, decay: float
) -> None:
    rows, columns = shape
    sigma = decay ** torch.arange(min(shape), dtype=torch.float64)
    eye = torch.eye(max(shape), dtype=torch.float64)
    spectrum = Spectrum(U=eye[:rows, : len(sigma)], sigma=sigma, right=eye[: len(sigma), :columns])
    mask = make_mask(spectrum, 0.5, REPAIRED)
    assume(ratio / mask.stretch < 0.99)
    mask = with_ratio(mask, ratio)
    k = mask.count_kept()
    error = float(spectrum.energy[k:].sum() / spectrum.energy.sum()) ** 0.5
    assume(min(abs(ratio + error - 1), abs(ratio - 1)) > 1e-6)  # at the edges rounding decides
    guidance = ara.measure_guidance([mask])
    fires = ratio + error > 1
    assert float(guidance.detach()) == pytest.approx(max(0, 1 - ratio) if fires else 0, abs=1e-12)
    pulled = float(find_gradient(guidance, mask) @ find_gradient(mask.find_ratio(), mask))
    assert (pulled < 0) == (fires and ratio < 1)  # descent raises the ratio
    assert pulled <= 0


def test_guidance_is_the_mean_over_layers() -> None:
    flat, low = make_mask(make_spectrum(20, 20), 0.5, REPAIRED), make_mask(make_spectrum(20, 20, 1), 0.5, REPAIRED)
    silent = replace(low, errors=torch.zeros_like(low.errors))
    assert float(ara.measure_guidance([flat]).detach()) == pytest.approx(0.5)
    assert float(ara.measure_guidance([flat, silent]).detach()) == pytest.approx(0.25)


@pytest.mark.parametrize("choice", [ORIGINAL, REPAIRED], ids=["original", "repaired"])
def test_the_effective_size_weighs_layers_and_counts_dense_ones_once(choice: AraChoice) -> None:
    small = with_ratio(make_mask(make_spectrum(10, 20), 0.5, REPAIRED), 0.25)
    large = with_ratio(make_mask(make_spectrum(20, 40), 0.5, REPAIRED), 1.1)
    size = ara.measure_size([small, large], 200 + 800 + 1000, repaired=choice.repaired)  # 1,000 have no mask
    assert float(size.detach()) == pytest.approx((0.25 * 200 + 800 + 1000) / 2000)
    step = find_gradient(size, small)
    torch.testing.assert_close(step, find_gradient(small.find_ratio(), small) * 200 / 2000)


@pytest.mark.parametrize(
    ("repaired", "kept", "guided"), [(False, 0.3, 1), (False, 0.6, 1), (True, 0.3, 0), (True, 0.6, 1)]
)
def test_the_penalty_is_of_size_and_guidance_and_repaired_of_size_alone_above_the_target(
    repaired: Any,  # noqa: ANN401
    kept: float,
    guided: int,
) -> None:
    mask = make_mask(make_spectrum(20, 20), 0.5, REPAIRED)
    choice = AraChoice(size_weight=7.0, guidance_weight=3.0, repaired=repaired)
    found = float(ara.measure_penalty({"l": mask}, kept, 400, choice).detach())
    assert found == pytest.approx(7 * (0.5 - kept) ** 2 + guided * 3 * 0.5)


def test_next_tokens_are_the_targets_of_a_language_model() -> None:
    tokens = torch.tensor([[5, 2, 7, 0], [1, 1, 3, 4]])
    model = nn.Identity()
    model.inputs = ("input_ids", "attention_mask")  # type: ignore[assignment]
    shown = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    outputs = torch.randn(2, 4, 9)
    nats = -outputs.log_softmax(-1)
    expected = [nats[0, 0, 2], nats[0, 1, 7], nats[1, 0, 1], nats[1, 1, 3], nats[1, 2, 4]]  # token 0 is padding
    loss = ara.match_next(model, (tokens, shown)).loss(outputs, torch.tensor([0, 1]))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss = ara.match_next(nn.Identity(), (tokens,)).loss(outputs[1:], torch.tensor([1]))
    torch.testing.assert_close(loss, torch.stack(expected[2:]).mean())


def test_labels_are_the_targets_of_a_classifier() -> None:
    outputs, labels = torch.randn(3, 5), torch.tensor([0, 4, 2, IGNORED])
    task = ara.match_targets((torch.zeros(4, 1),), labels)
    expected = functional.cross_entropy(outputs[:2], labels[[2, 0]])
    torch.testing.assert_close(task.loss(outputs, torch.tensor([2, 0, 3])), expected)


def test_without_labels_the_dense_models_outputs_are_the_target() -> None:
    torch.manual_seed(0)
    dense, other = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(8, 4)
    loss = ara.match_outputs(dense, (x,)).loss
    picked = torch.tensor([6, 1, 3])
    torch.testing.assert_close(loss(dense(x[picked]), picked), torch.tensor(0.0), atol=1e-7, rtol=0)
    expected = measure_divergence(other, (x[picked],), dense(x[picked]).detach())
    assert float(loss(other(x[picked]), picked).detach()) == pytest.approx(expected, rel=1e-5)


def test_hidden_positions_count_for_nothing() -> None:
    class Tagger(nn.Module):
        inputs = ("x", "attention_mask")

        def forward(self, x: Tensor, _mask: Tensor) -> Tensor:
            return x

    x, shown = torch.randn(2, 3, 4), torch.tensor([[1, 0, 0], [1, 1, 1]])
    other = torch.where(shown[..., None].bool(), x, torch.randn(2, 3, 4))
    loss = ara.match_outputs(Tagger(), (x, shown)).loss
    torch.testing.assert_close(loss(other, torch.arange(2)), torch.tensor(0.0), atol=1e-7, rtol=0)
    other[1, 2] += torch.tensor([1.0, 0, 0, 0])
    assert float(loss(other, torch.arange(2))) > 0


# --- training ------------------------------------------------------------------------------------------------------


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))


def make_convnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(12, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(96, 10)),
    )


@dataclass(frozen=True)
class Trained:
    """A net that reads digits, and what allocation knows of it."""

    model: nn.Module
    spectra: dict[str, Spectrum]
    stats: tuple[LayerStats, ...]
    calibration: Tensor
    test: Tensor

    @property
    def total(self) -> int:
        return sum(entry.layer.parameters for entry in self.stats)

    def measure(self, plan: Choices) -> float:
        cut = copy.deepcopy(self.model)
        for name, factors in plan.items():
            if factors is not None:
                A, B = truncate(self.spectra[name], factors.rank)
                weight = get_layer(cut, name).weight
                weight.data.copy_((A @ B).reshape(weight.shape))
        return measure_divergence(cut, (self.test,), predict(self.model, (self.test,)))


def train(make: Callable[[], nn.Module]) -> Trained:
    torch.manual_seed(0)
    digits = load_digits()
    x, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        picked = torch.randint(1200, (64,))
        loss = functional.cross_entropy(model(x[picked]), labels[picked])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.eval()
    layers = find_layers(model)
    grams = collect_grams(model, (x[:CALIBRATION],), layers)
    spectra = {
        layer.name: decompose_eigen(as_matrix(get_layer(model, layer.name)), grams[layer.name]) for layer in layers
    }
    stats = tuple(make_stats(layer, spectra[layer.name].energy) for layer in layers)
    return Trained(model, spectra, stats, x[:CALIBRATION], x[1200:])


@pytest.fixture(scope="module")
def mlp() -> Trained:
    return train(make_mlp)


@pytest.fixture(scope="module")
def convnet() -> Trained:
    return train(make_convnet)


@pytest.mark.parametrize("kept", [0.4, 0.6])
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_learned_ranks_beat_uniform_ones_at_the_same_budget(
    name: str, kept: float, request: pytest.FixtureRequest
) -> None:
    net: Trained = request.getfixturevalue(name)
    task = ara.match_outputs(net.model, (net.calibration,))
    ratios = train_ratios(net.model, net.spectra, task, kept, FAST, 0, ignore_tick)
    budget = int(kept * net.total)
    learned = finalise(ratios, net.stats, budget, repaired=True)
    uniform = allocate_uniform(net.stats, budget, RankChoice(method="uniform", step=1))
    assert total_cost(net.stats, learned) <= budget
    assert net.measure(learned) < 0.7 * net.measure(uniform)


class Forked(nn.Module):
    """Two like branches, of which the output hears only one."""

    def __init__(self, hearing: tuple[float, float]) -> None:
        super().__init__()
        self.left, self.right, self.hearing = nn.Linear(24, 24), nn.Linear(24, 24), hearing

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.hearing[0] * self.left(x) + self.hearing[1] * self.right(x)
        return y


@pytest.mark.parametrize("choice", [ORIGINAL, REPAIRED], ids=["original", "repaired"])
@pytest.mark.parametrize("hearing", [(1.0, 0.0), (0.0, 1.0)])
def test_rank_moves_from_a_useless_layer_to_a_useful_one(hearing: tuple[float, float], choice: AraChoice) -> None:
    torch.manual_seed(0)
    model, x = Forked(hearing), torch.randn(64, 24)
    model.right.load_state_dict(model.left.state_dict())
    spectra = {
        layer.name: decompose_plain(as_matrix(get_layer(model, layer.name)), None) for layer in find_layers(model)
    }
    task = ara.match_outputs(model, (3 * x,))
    choice = replace(FAST, guidance_weight=0.0, repaired=choice.repaired)  # it treats both alike
    ratios = train_ratios(model, spectra, task, 0.5, choice, 0, ignore_tick)
    useful, useless = (ratios["left"], ratios["right"]) if hearing[0] else (ratios["right"], ratios["left"])
    assert useful > 0.55
    assert useless < 0.45


def test_repaired_training_ends_at_the_target_size_where_guidance_takes_the_published_above_it() -> None:
    torch.manual_seed(0)
    model, x = Forked((1.0, 1.0)), torch.randn(64, 24)
    spectra = {
        layer.name: decompose_plain(as_matrix(get_layer(model, layer.name)), None) for layer in find_layers(model)
    }
    task = ara.match_outputs(model, (x,))
    sizes = []
    for choice in (replace(FAST, repaired=False), FAST):
        ratios = train_ratios(model, spectra, task, 0.5, choice, 0, ignore_tick)
        sizes.append(sum(min(1, ratio) for ratio in ratios.values()) / 2)
    assert sizes[0] > 0.6
    assert sizes[1] == pytest.approx(0.5, abs=0.03)


def test_a_model_in_training_mode_is_judged_as_it_will_be_used(convnet: Trained) -> None:
    choice, runs = replace(FAST, steps=5), []
    task = ara.match_outputs(convnet.model, (convnet.calibration,))
    for training in (False, True):
        model = copy.deepcopy(convnet.model).train(training)
        runs.append(train_ratios(model, convnet.spectra, task, 0.5, choice, 0, ignore_tick))
    assert runs[0] == runs[1]


def test_training_is_deterministic_and_tells_its_progress(convnet: Trained) -> None:
    ticks: list[tuple[int, int]] = []
    choice = replace(FAST, steps=7, batch=100)
    task = ara.match_outputs(convnet.model, (convnet.calibration,))
    runs = [
        train_ratios(convnet.model, convnet.spectra, task, 0.5, choice, seed, lambda *done: ticks.append(done))
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert ticks == [(done, 7) for done in range(1, 8)] * 3
    assert list(runs[0]) == list(convnet.spectra)


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    batches = [batch.tolist() for batch in ara._draw_batches(10, AraChoice(steps=10, batch=3), 0)]
    assert [len(batch) for batch in batches] == [3, 3, 3, 1, 3, 3, 3, 1, 3, 3]
    epochs = [list(itertools.chain(*batches[start : start + 4])) for start in (0, 4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


class Echo(nn.Module):
    """Says what it hears, whatever its layer is worth."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + 0 * self.layer(x)
        return y


def test_every_batch_meets_its_own_targets() -> None:
    model, seen = Echo(), list[int]()

    def loss(outputs: Tensor, picked: Tensor) -> Tensor:
        assert torch.equal(outputs[:, 0].detach(), picked.float())
        seen.extend(picked.tolist())
        return outputs.mean()

    spectra = {"layer": decompose_plain(as_matrix(model.layer), None)}
    task = Task((torch.arange(10.0)[:, None].expand(10, 6),), loss)
    train_ratios(model, spectra, task, 0.5, AraChoice(steps=2, batch=5), 0, ignore_tick)
    assert sorted(seen) == list(range(10))


class Interrupted(Exception):
    """Any reason to stop."""


@pytest.mark.parametrize("stop", [None, Interrupted, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_even_when_training_stops(
    stop: type[BaseException] | None, convnet: Trained
) -> None:
    model = copy.deepcopy(convnet.model).train()  # its batch-norm statistics must not move either
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]

    def tick(done: int, _total: int) -> None:
        if stop is not None and done == 2:
            raise stop

    def learn() -> None:
        task = ara.match_outputs(model, (convnet.calibration,))
        train_ratios(model, convnet.spectra, task, 0.5, replace(FAST, steps=3), 0, tick)

    if stop is None:
        learn()
    else:
        with pytest.raises(stop):
            learn()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_logits_of_layers_that_a_rank_makes_cheaper_are_trained() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 1)), torch.randn(32, 12)
    spectra = {name: decompose_plain(as_matrix(get_layer(model, name)), None) for name in ("0", "2")}
    task = ara.match_targets((x,), torch.zeros(32, dtype=torch.int64))
    ratios = train_ratios(model, spectra, task, 0.5, replace(FAST, steps=3), 0, ignore_tick)
    assert ratios["2"] == 1  # 12 parameters, 13 in factors
    assert ratios["0"] < 0.9
    ticks: list[int] = []
    tick = lambda done, _total: ticks.append(done)  # noqa: E731
    assert train_ratios(model, {"2": spectra["2"]}, task, 0.5, FAST, 0, tick) == {"2": 1}
    assert train_ratios(model, spectra, task, 1.0, FAST, 0, tick) == {"0": 1, "2": 1}
    assert ticks == []


class Mixed(nn.Module):
    """Two layers of equal size, of which only one can be factored."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.row = nn.Linear(12, 12), nn.Linear(144, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.square(x) + self.row(x.repeat(1, 12))
        return y


def test_layers_that_stay_dense_count_for_the_size() -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(32, 12)
    spectra = {
        layer.name: decompose_plain(as_matrix(get_layer(model, layer.name)), None) for layer in find_layers(model)
    }
    choice = replace(FAST, guidance_weight=0.0)
    ratios = train_ratios(model, spectra, ara.match_outputs(model, (x,)), 0.7, choice, 0, ignore_tick)
    assert ratios["row"] == 1
    assert ratios["square"] == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("choice", [ORIGINAL, REPAIRED], ids=["original", "repaired"])
def test_an_absorbed_layer_leaves_dense_only_when_repaired(choice: AraChoice) -> None:
    torch.manual_seed(0)
    model, x = Forked((1.0, 0.0)), torch.randn(16, 24)
    spectra = {"right": decompose_plain(as_matrix(model.right), None)}
    task = ara.match_outputs(model, (x,))
    masks = {"right": with_ratio(make_mask(spectra["right"], 0.5, choice), 1.05)}
    masked = ara.attach(model, spectra, masks, repaired=choice.repaired)
    optimizer = torch.optim.Adam([masks["right"].logits], lr=1e-2)
    for _ in range(60):
        loss = task.loss(masked(x), torch.arange(16)) + ara.measure_penalty(masks, 0.5, 576, choice)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert (float(masks["right"].find_ratio().detach()) < 1) == choice.repaired


# --- ranks ---------------------------------------------------------------------------------------------------------


@st.composite
def nets(draw: st.DrawFn) -> tuple[tuple[LayerStats, ...], dict[str, float], int]:
    """Layers with ratios, and the rank step."""
    step = draw(st.sampled_from([1, 1, 4]))
    stats, ratios = [], {}
    for index in range(draw(st.integers(1, 6))):
        rows, columns = draw(st.tuples(st.integers(1, 24), st.integers(2, 24)))
        decay = draw(st.floats(0.3, 1))
        energy = decay ** torch.arange(min(rows, columns), dtype=torch.float64)
        stats.append(make_stats(Layer(name=f"l{index}", rows=rows, columns=columns), energy, step))
        ratios[f"l{index}"] = draw(st.one_of(st.floats(1e-9, 1.2), st.floats(0.98, 1.2)))
    return tuple(stats), ratios, step


def find_cheapest(stats: tuple[LayerStats, ...]) -> int:
    return sum(min([one.cost for one in entry.candidates], default=entry.layer.parameters) for entry in stats)


@given(net=nets(), share=st.floats(0, 1.1))
def test_repaired_plans_never_exceed_the_budget_and_end_within_a_step(
    net: tuple[tuple[LayerStats, ...], dict[str, float], int], share: float
) -> None:
    stats, ratios, step = net
    cheapest, total = find_cheapest(stats), sum(entry.layer.parameters for entry in stats)
    budget = cheapest + int(share * (total - cheapest))
    plan = finalise(ratios, stats, budget, repaired=True)
    left = budget - total_cost(stats, plan)
    assert left >= 0
    for entry in stats:
        factors = plan[entry.layer.name]
        if factors is not None:
            assert factors in [one.factors for one in entry.candidates]
            larger = entry.layer.count_factored(factors.rank + step)
            assert left < min(larger, entry.layer.parameters) - entry.layer.count_factored(factors.rank)


@given(net=nets(), share=st.floats(0, 1.1))
def test_published_plans_keep_every_dense_layer_and_scale_the_others_in_proportion(
    net: tuple[tuple[LayerStats, ...], dict[str, float], int], share: float
) -> None:
    stats, ratios, step = net
    budget = int(share * sum(entry.layer.parameters for entry in stats))
    plan = finalise(ratios, stats, budget, repaired=False)
    held = [entry for entry in stats if ratios[entry.layer.name] >= 0.99 or not entry.candidates]
    rest = [entry for entry in stats if entry not in held]
    assert all(plan[entry.layer.name] is None for entry in held)
    asked = sum(ratios[entry.layer.name] * entry.layer.parameters for entry in rest)
    left = max(0, budget - sum(entry.layer.parameters for entry in held))
    for entry in rest:
        factors = plan[entry.layer.name]
        assert factors is not None
        exact = (
            left / asked * ratios[entry.layer.name] * entry.layer.parameters / (entry.layer.rows + entry.layer.columns)
        )
        assume(abs(exact / step - round(exact / step)) > 1e-9)
        last = entry.candidates[-1].factors.rank
        assert factors.rank == min(last, max(step, int(exact / step) * step))


def make_square(count: int, size: int = 16) -> tuple[LayerStats, ...]:
    energy = torch.ones(size, dtype=torch.float64)
    return tuple(make_stats(Layer(name=f"l{index}", rows=size, columns=size), energy) for index in range(count))


def test_the_published_plan_misses_a_budget_that_its_dense_layers_eat() -> None:
    stats = make_square(4)  # 256 parameters each, 32 a rank
    ratios = {"l0": 1.02, "l1": 1.0, "l2": 0.99, "l3": 0.2}
    original = finalise(ratios, stats, 700, repaired=False)
    assert [original[name] for name in ratios] == [None, None, None, Factors(rank=1)]
    assert total_cost(stats, original) == 3 * 256 + 32 > 700
    repaired = finalise(ratios, stats, 700, repaired=True)
    assert total_cost(stats, repaired) <= 700
    assert repaired["l0"] is None


def test_the_dense_layer_of_least_ratio_is_demoted_first() -> None:
    stats = make_square(3)
    for order in itertools.permutations([1.0, 1.05, 1.1]):
        ratios = {f"l{index}": ratio for index, ratio in enumerate(order)}
        plan = finalise(ratios, stats, 2 * 256 + 64, repaired=True)
        demoted = {name for name, factors in plan.items() if factors is not None}
        assert demoted == {min(ratios, key=ratios.__getitem__)}


def test_as_many_are_demoted_as_lose_least() -> None:
    flat, steep = torch.ones(16, dtype=torch.float64), 0.1 ** torch.arange(16, dtype=torch.float64)
    names = [Layer(name=name, rows=16, columns=16) for name in "abc"]
    stats = (make_stats(names[0], steep), make_stats(names[1], steep), make_stats(names[2], flat))
    ratios = {"a": 1.0, "b": 1.1, "c": 0.5}
    # with both dense the flat layer is left rank 1 of 16; without them it gets 4 and they lose next to nothing
    plan = finalise(ratios, stats, 2 * 256 + 33, repaired=True)
    losses = {name: entry.predict_error(plan[name]) for name, entry in zip("abc", stats, strict=True)}
    assert plan["a"] is not None
    assert losses["c"] < 15 / 16
    assert losses["a"] < 0.01


def test_more_is_left_to_layers_that_ask_for_more() -> None:
    stats = make_square(2)
    plan = finalise({"l0": 0.6, "l1": 0.2}, stats, 8 * 32, repaired=True)
    assert [plan["l0"], plan["l1"]] == [Factors(rank=6), Factors(rank=2)]
    plan = finalise({"l0": 0.3, "l1": 0.1}, stats, 8 * 32, repaired=False)  # scaled up as well as down
    assert [plan["l0"], plan["l1"]] == [Factors(rank=6), Factors(rank=2)]


def test_a_budget_for_all_keeps_all_dense() -> None:
    stats = make_square(3)
    plan = finalise({"l0": 1.1, "l1": 0.3, "l2": 1e-12}, stats, 3 * 256, repaired=True)
    assert plan == dict.fromkeys(["l0", "l1", "l2"])
