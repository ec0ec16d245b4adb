"""Two models are compared on as few samples as tell them apart."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rankship_pipeline.evaluate import lead
from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.lead import measure_lead
from rankship_pipeline.models.data import Inputs

X = (torch.randn(150, 6, generator=torch.Generator().manual_seed(3)),)


def make_net(noise: float, seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(6, 4)
    with torch.no_grad():
        net.weight.add_(noise * torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)))
    return net.eval()


def test_it_is_the_difference_of_the_divergences_over_all_dense_models() -> None:
    first, second, dense = make_net(0.2, 1), make_net(0.2, 2), make_net(0.0)
    other = (X[0][:60] * 2,)

    def add_up(model: nn.Module) -> float:
        found = 0.0
        for inputs in (X, other):
            whole = len(inputs[0]) / 4
            found += whole * measure_divergence(model, inputs, predict(dense, inputs))
        return found

    wanted = (add_up(first) - add_up(second)) / (150 / 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lead, "_DOUBT", 0.0)  # every sample
        assert measure_lead(first, second, [(dense, X), (dense, other)]) == pytest.approx(wanted, rel=0.1)
    assert measure_lead(second, first, [(dense, X)]) * wanted < 0


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
