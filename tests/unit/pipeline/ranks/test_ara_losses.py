"""What ARA's training is pulled by: the guidance, the size, and the task."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from make.masks import ORIGINAL, REPAIRED, find_gradient, make_spectrum, shapes, with_ratio
from rankship_pipeline.evaluate.accuracy import IGNORED, measure_divergence
from rankship_pipeline.factors.decompose import Spectrum
from rankship_pipeline.ranks import ara
from rankship_pipeline.ranks.ara import AraChoice, make_mask


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
