"""Divergence and Fisher information of outputs of every kind."""

import math

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.likelihood import Answer, Family, measure_scales, take_logs
from rankship_pipeline.evaluate.likeness import measure_likeness
from rankship_pipeline.models.layers import find_layers

UNITS = torch.tensor([1.0, 1e3, 1e-3])
VALUES = {"output": Answer(family="values")}


def make_numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_divergence_of_numbers_does_not_depend_on_their_units() -> None:
    teacher, student = make_numbers(0, 90, 3), make_numbers(1, 90, 3)
    plain = measure_divergence(nn.Identity(), (student,), {"output": teacher}, VALUES)
    other = measure_divergence(nn.Identity(), (student * UNITS,), {"output": teacher * UNITS}, VALUES)
    assert other == pytest.approx(plain, rel=1e-5)
    expected = ((student - teacher) / teacher.std(0, correction=0)).square().mean() / 2
    assert plain == pytest.approx(float(expected), rel=1e-4)


def test_the_error_of_numbers_is_a_share_of_their_spread() -> None:
    teacher = make_numbers(0, 500, 3) * UNITS
    off = teacher + 0.1 * UNITS * make_numbers(1, 500, 3)
    assert measure_likeness(nn.Identity(), (off,), {"output": teacher}, VALUES).error == pytest.approx(0.1, rel=0.1)
    assert measure_likeness(nn.Identity(), (teacher,), nn.Identity(), VALUES).error == 0


def test_numbers_have_no_class_to_agree_on() -> None:
    x = make_numbers(0, 9, 1)
    alike = measure_likeness(nn.Identity(), (x,), {"output": x}, VALUES)
    assert (alike.agreed, alike.answers) == (0, 0)


def test_a_column_that_never_changes_counts_with_its_size() -> None:
    scales = measure_scales([{"output": torch.tensor([[5.0, 0.0], [5.0, 0.0]])}], VALUES)
    torch.testing.assert_close(scales["output"].float(), torch.tensor([0.005, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_spread_of_columns_is_summed_batch_by_batch(dtype: torch.dtype) -> None:
    outputs = make_numbers(0, 70, 3).to(dtype) * UNITS + 1e4
    before = outputs.clone()
    scales = measure_scales([{"output": part} for part in torch.split(outputs, 16)], VALUES)["output"]
    exact = outputs.double()
    torch.testing.assert_close(scales, (exact.var(0, correction=0) + 1e-6 * exact.square().mean(0)).sqrt())
    assert torch.equal(outputs, before)


@pytest.mark.parametrize("family", ["logits", "probabilities"])
def test_probabilities_and_their_logits_diverge_alike(family: Family) -> None:
    teacher, student = make_numbers(0, 50, 4), make_numbers(1, 50, 4)
    expected = measure_divergence(nn.Identity(), (student,), teacher)
    change = nn.Softmax(-1) if family == "probabilities" else nn.Identity()
    found = measure_divergence(change, (student,), {"output": change(teacher)}, {"output": Answer(family=family)})
    assert found == pytest.approx(expected, rel=1e-4)


def test_one_logit_is_a_choice_of_two() -> None:
    logs = take_logs(torch.tensor([[0.0], [math.log(3)]]), Answer(family="binary logits"))
    torch.testing.assert_close(logs.exp(), torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    whole = take_logs(torch.tensor([[0.5], [0.75]]), Answer(family="binary probabilities"))
    torch.testing.assert_close(whole, logs)


def test_classes_may_lie_on_any_axis() -> None:
    maps = make_numbers(0, 2, 5, 3, 4)
    logs = take_logs(maps, Answer(axis=1))
    assert logs.shape == (2, 3, 4, 5)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(2, 3, 4))


class Two(nn.Module):
    """Gives its inputs back as two outputs."""

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left, right


def test_several_outputs_add_up() -> None:
    logits, numbers = (make_numbers(0, 40, 3), make_numbers(1, 40, 3)), (make_numbers(2, 40, 2), make_numbers(3, 40, 2))
    kinds = {"0": Answer(), "1": Answer(family="values")}
    both = measure_divergence(Two(), (logits[0], numbers[0]), {"0": logits[1], "1": numbers[1]}, kinds)
    apart = measure_divergence(nn.Identity(), (logits[0],), logits[1])
    apart += measure_divergence(nn.Identity(), (numbers[0],), {"output": numbers[1]}, VALUES)
    assert both == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize("columns", [3, 24])
def test_the_curvature_of_a_linear_regression_is_its_outputs_inverse_variance(columns: int) -> None:
    """½·tr(H·Δ·G·Δᵀ) is then the divergence itself."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, columns)), torch.randn(4000, 6)
    (layer,) = find_layers(net)
    H = collect_curvatures(net, (x,), (layer,), likelihood=VALUES)[layer.name]
    variance = net(x).detach().double().var(0)
    torch.testing.assert_close(H.diagonal(), 1 / variance / columns, rtol=0.1, atol=0)
    assert float((H - H.diagonal().diag()).abs().max()) < 0.2 * float(H.diagonal().max())
