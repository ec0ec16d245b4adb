"""Two models are compared on as few samples as tell them apart."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate import lead
from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.lead import measure_lead
from rankship_pipeline.evaluate.likelihood import Answer
from rankship_pipeline.models.data import Inputs

X = (torch.randn(150, 6, generator=torch.Generator().manual_seed(3)),)


def make_net(noise: float, seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(6, 4)
    with torch.no_grad():
        net.weight.add_(noise * torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)))
    return net.eval()


def test_it_is_the_difference_of_the_mean_divergences_from_all_dense_models(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, dense = make_net(0.2, 1), make_net(0.2, 2), make_net(0.0)
    other = (X[0][:60] * 2,)

    def add_up(model: nn.Module) -> float:
        return sum(measure_divergence(model, inputs, predict(dense, inputs)) for inputs in (X, other))

    wanted = add_up(first) - add_up(second)
    assert measure_lead(second, first, [(dense, X)]) * wanted < 0
    monkeypatch.setattr(lead, "_DOUBT", 0.0)  # every sample
    assert measure_lead(first, second, [(dense, X), (dense, other)]) == pytest.approx(wanted, rel=0.1)


class Wrong(nn.Module):
    """Numbers that are off where they are zero, or by a share elsewhere."""

    def __init__(self, at_zero: float, share: float) -> None:
        super().__init__()
        self.at_zero, self.share = at_zero, share

    def forward(self, x: Tensor) -> Tensor:
        y = x.clamp_min(0)
        return torch.where(y == 0, y + self.at_zero, y * (1 + self.share))


def test_samples_that_come_sorted_mislead_nobody() -> None:
    outputs = (torch.linspace(-850, 150, 1000)[:, None],)  # most are zero, and come first
    first, second, dense = Wrong(5.0, 0.0), Wrong(0.0, 0.3), Wrong(0.0, 0.0)
    values = {"output": Answer(family="values")}
    known = predict(dense, outputs)
    wanted = [measure_divergence(one, outputs, known, values) for one in (first, second)]
    found = measure_lead(first, second, [(dense, outputs)], values)
    assert found * (wanted[0] - wanted[1]) > 0
    assert found == pytest.approx(wanted[0] - wanted[1], rel=0.5), "the spread is that of many samples"


def count_samples(monkeypatch: pytest.MonkeyPatch, leads: Callable[[int], float]) -> int:
    """How many samples two models are compared on, if the second leads by so much in each part."""
    seen: list[int] = []

    def measure(_model: nn.Module, part: Inputs, *_given: object) -> float:
        seen.append(len(part[0]))
        parts = len(seen) // 2
        return leads(parts) if len(seen) % 2 else 0.0

    monkeypatch.setattr(lead, "measure_divergence", measure)
    measure_lead(make_net(0.1), make_net(0.2), [(make_net(0.0), X)])
    return sum(seen) // 2


def test_as_few_samples_are_taken_as_tell_the_models_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_samples(monkeypatch, lambda part: 1 + 0.1 * (part % 3)) == 16
    assert count_samples(monkeypatch, lambda part: 1 + 3.0 * (part % 2)) == 32
    assert count_samples(monkeypatch, lambda part: (-1.0) ** part) == 150, "all, where they do not"
