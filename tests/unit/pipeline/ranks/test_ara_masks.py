"""ARA's masks, and layers behind them."""

import copy
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from make.masks import (
    ORIGINAL,
    REPAIRED,
    find_gradient,
    logits_of_any_kind,
    make_spectrum,
    shapes,
    with_logits,
    with_ratio,
)
from rankship_pipeline.factors.decompose import Spectrum, decompose_plain, truncate
from rankship_pipeline.models.layers import as_matrix
from rankship_pipeline.ranks import ara
from rankship_pipeline.ranks.ara import AraChoice, Masked, make_mask


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
        spectra = {"0": decompose_plain(as_matrix(head), None)}
        y = ara.attach(nn.Sequential(head), spectra, {"0": full}, repaired=False)(x)
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
    masked = ara.attach(nn.Sequential(module), {"0": spectrum}, {"0": mask}, repaired=repaired).get_submodule("0")
    assert isinstance(masked, Masked)
    return masked, spectrum


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
