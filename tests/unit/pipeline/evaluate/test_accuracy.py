import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.accuracy import IGNORED, measure_accuracy, measure_divergence, wilson_interval
from rankship_pipeline.evaluate.calibrate import BATCH, predict


@pytest.mark.parametrize(
    ("successes", "low", "high"), [(0, 0.0, 0.2775328), (1, 0.0178762, 0.4041500), (5, 0.2365931, 0.7634069)]
)
def test_the_interval_is_wilsons(successes: int, low: float, high: float) -> None:
    """Of ten trials, as R's prop.test gives it without a correction for continuity."""
    assert wilson_interval(successes, 10) == pytest.approx((low, high), abs=1e-7)
    assert wilson_interval(10 - successes, 10) == pytest.approx((1 - high, 1 - low), abs=1e-7)


def test_the_interval_holds_the_share_and_stays_within_zero_and_one() -> None:
    for trials in range(1, 40):
        for successes in range(trials + 1):
            low, high = wilson_interval(successes, trials)
            assert 0 <= low <= successes / trials + 1e-15
            assert successes / trials - 1e-15 <= high <= 1


def test_prediction_does_not_depend_on_batches() -> None:
    net, x = nn.Linear(3, 4).eval(), torch.randn(2 * BATCH + 7, 3)
    assert predict(net, (x,))["output"].shape == (2 * BATCH + 7, 4)
    torch.testing.assert_close(predict(net, (x,))["output"], net(x))


def test_accuracy_counts_the_largest_logit() -> None:
    logits = torch.tensor([[1.0, 2, 0], [3, 1, 0], [0, 1, 2], [5, 1, 1]])
    accuracy = measure_accuracy(nn.Identity(), (logits,), torch.tensor([1, 0, 0, 1]), stage="merged")
    assert (accuracy.stage, accuracy.samples, accuracy.correct, accuracy.value) == ("merged", 4, 2, 0.5)
    assert (accuracy.low, accuracy.high) == wilson_interval(2, 4)


def test_a_language_model_is_judged_where_a_label_counts() -> None:
    logits = torch.tensor([[[1.0, 2, 0], [3, 1, 0]], [[0, 1, 2], [5, 1, 1]]])
    accuracy = measure_accuracy(nn.Identity(), (logits,), torch.tensor([[1, IGNORED], [0, 0]]), stage="merged")
    assert (accuracy.samples, accuracy.correct) == (3, 2)
    expected = -sum(
        float(logits[place].log_softmax(-1)[label]) for place, label in (((0, 0), 1), ((1, 0), 0), ((1, 1), 0))
    )
    assert accuracy.cross_entropy == pytest.approx(expected / 3, rel=1e-6)


class Masked(nn.Module):
    """Gives its first input back; its second hides positions."""

    inputs = ("logits", "attention_mask")

    def forward(self, logits: Tensor, _mask: Tensor) -> Tensor:
        return logits


def test_divergence_is_a_mean_over_the_positions_that_are_not_hidden() -> None:
    teacher, student = torch.randn(70, 3, 5), torch.randn(70, 3, 5)
    mask = (torch.rand(70, 3) > 0.4).long()
    found = measure_divergence(Masked(), (student, mask), teacher)
    shown = mask.bool()
    assert found == pytest.approx(measure_divergence(nn.Identity(), (student[shown],), teacher[shown]), rel=1e-5)
    assert measure_divergence(nn.Identity(), (student,), teacher) == pytest.approx(
        measure_divergence(nn.Identity(), (student.flatten(0, 1),), teacher.flatten(0, 1)), rel=1e-5
    )


def test_divergence_is_zero_from_itself_and_from_shifted_logits() -> None:
    x = torch.randn(9, 5)
    assert measure_divergence(nn.Identity(), (x,), x) == 0
    assert measure_divergence(nn.Identity(), (x,), x + 3) == pytest.approx(0, abs=1e-6)


def test_divergence_is_kullback_and_leiblers_from_teacher_to_student() -> None:
    teacher, student = torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    expected = float((teacher * (teacher / student).log()).sum() / 2)
    assert measure_divergence(nn.Identity(), (student.log(),), teacher.log()) == pytest.approx(expected, rel=1e-5)
