"""Two models compared in one pass: against definitions, batch by batch, and by a model or its outputs."""

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate import likeness
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.likelihood import Answer
from rankship_pipeline.evaluate.likeness import are_same, measure_likeness
from rankship_pipeline.evaluate.remembered import Remembered

LOGITS = {"output": Answer()}


class Counting(nn.Module):
    """A linear layer that counts its samples."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.samples = nn.Linear(5, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        y: Tensor = self.layer(x)
        return y


def draw_inputs() -> tuple[Tensor]:
    return (torch.randn(150, 5, generator=torch.Generator().manual_seed(1)),)


def test_agreement_and_error_are_their_definitions() -> None:
    model, other, inputs = Counting(0), Counting(1), draw_inputs()
    own, wanted = (predict(one, inputs)["output"] for one in (model, other))
    alike = measure_likeness(model, inputs, other, LOGITS)
    assert (alike.agreed, alike.answers) == (int((own.argmax(1) == wanted.argmax(1)).sum()), 150)
    expected = ((own - wanted).square().mean(0) / wanted.var(0, correction=0)).mean().sqrt()
    assert alike.error == pytest.approx(float(expected), rel=1e-4)


def test_batches_and_outputs_in_the_models_place_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, inputs = Counting(0), Counting(1), draw_inputs()
    whole = measure_likeness(model, inputs, other, LOGITS)
    given = measure_likeness(model, inputs, predict(other, inputs), LOGITS)
    monkeypatch.setattr(likeness, "_BYTES", 84)  # seven samples of three numbers
    few = measure_likeness(model, inputs, other, LOGITS)
    for one in (given, few):
        assert (one.agreed, one.answers) == (whole.agreed, whole.answers)
        assert one.error == pytest.approx(whole.error, rel=1e-6)


def test_each_model_runs_once_and_one_with_the_same_tensors_not_at_all() -> None:
    model, other, same, inputs = Counting(0), Counting(1), Counting(1), draw_inputs()
    measure_likeness(model, inputs, other, LOGITS)
    assert (model.samples, other.samples) == (150, 151)  # one more sample tells how large the outputs are
    alike = measure_likeness(same, inputs, other, LOGITS)
    assert (alike.agreed, alike.error, same.samples) == (150, 0, 0)


def test_models_are_the_same_by_their_tensors_unless_something_is_hooked_to_one() -> None:
    model, twin, inputs = Counting(0), Counting(0), draw_inputs()
    known = Remembered(model, inputs, predict(model, inputs))
    assert are_same(model, twin)
    assert are_same(known, twin)
    assert not are_same(known, Remembered(nn.Identity(), inputs, predict(twin, inputs)))
    twin.layer.register_forward_pre_hook(lambda _module, args: (args[0].round(),))
    assert not are_same(model, twin), "as where activations are rounded"
