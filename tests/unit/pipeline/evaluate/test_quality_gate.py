from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.accuracy import measure_accuracy
from rankship_pipeline.evaluate.quality_gate import compare_with_source, describe_loss, refuse_lost
from rankship_pipeline.foundation.errors import QualityLost
from rankship_pipeline.foundation.quality import Fidelity, Score
from rankship_pipeline.models.data import Data, Inputs
from rankship_pipeline.recipe.choices import QualityChoice

COSTS = {f"layer{index}": index / 10 for index in range(7)}


def accuracy(correct: int) -> Score:
    return Score(stage="s", samples=200, value=correct / 200, correct=correct, low=0, high=1)


def make_fidelity(source: str, agreement: float, tests: tuple[int, int] | None = None) -> Fidelity:
    before, after = (None, None) if tests is None else map(accuracy, tests)
    return Fidelity(stage="merged", source=source, answers=50, agreement=agreement, before=before, after=after)


def rate(model: nn.Module, inputs: Inputs, labels: Tensor, stage: str) -> Score:
    return measure_accuracy(model, inputs, labels, stage=stage)


def make_selector(columns: Sequence[int]) -> nn.Module:
    """Gives some columns of its input as logits."""
    layer = nn.Linear(4, len(columns), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4)[list(columns)])
    return layer.eval()


def make_data(*, with_tests: bool) -> Data:
    x = torch.eye(4).repeat(5, 1)
    tests: dict[str, tuple[Inputs, Tensor]] = {"a": ((x,), torch.arange(4).repeat(5))} if with_tests else {}
    return Data(calibration={"a": (x,)}, test_inputs=(x,), test_labels=torch.zeros(20).long(), tests=tests)


def test_a_model_compared_with_itself_lost_nothing() -> None:
    same = make_selector((0, 1, 2, 3))
    found = compare_with_source(same, same, "a", make_data(with_tests=True), "merged", rate)
    assert (found.agreement, found.answers, found.lost_points) == (1, 20, 0)
    assert found.before is not None
    assert found.before.value == 1


def test_agreement_needs_no_labels_and_accuracy_is_on_the_models_own_tests() -> None:
    source, other = make_selector((0, 1, 2, 3)), make_selector((0, 1, 3, 2))
    found = compare_with_source(other, source, "a", make_data(with_tests=False), "merged", rate)
    assert (found.agreement, found.before, found.after) == (0.5, None, None)
    assert found.lost_points == 50
    tested = compare_with_source(source, other, "a", make_data(with_tests=True), "compressed", rate)
    assert tested.agreement == 0.5
    assert tested.lost_points == -50, "the later model does better"
    assert tested.before is not None
    assert tested.before.stage == "source:a"
    assert tested.after is not None
    assert tested.after.stage == "compressed"


def test_a_specialist_that_lost_more_than_allowed_is_named_with_where_to_look() -> None:
    lost = [make_fidelity("mnist", 0.9, (190, 170)), make_fidelity("fashion", 0.8), make_fidelity("cifar", 0.97)]
    with pytest.raises(QualityLost) as caught:
        refuse_lost(lost, QualityChoice(max_merge_loss_points=5), "max_merge_loss_points", COSTS)
    message = str(caught.value)
    assert "stage merged lost more than quality.max_merge_loss_points = 5 points allows" in message
    assert "mnist: 10.0 points of test accuracy (95.0 % → 85.0 % of 200)" in message
    assert "fashion: 20.0 points of agreement" in message
    assert "cifar" not in message
    assert "by merging: layer6 60.0 %, layer5 50.0 %, layer4 40.0 %, layer3 30.0 %, layer2 20.0 %" in message
    assert "layer1" not in message
    assert "merge.method" in caught.value.hint


@pytest.mark.parametrize("allowed", [None, 10.0, 100.0])
def test_what_is_allowed_passes(allowed: float | None) -> None:
    choice = QualityChoice(max_merge_loss_points=0, max_loss_points=allowed)
    refuse_lost([make_fidelity("mnist", 0.1, (190, 170))], choice, "max_loss_points", COSTS)


def test_without_anything_known_of_layers_none_are_named() -> None:
    with pytest.raises(QualityLost) as caught:
        refuse_lost([make_fidelity("a", 0.5)], QualityChoice(max_loss_points=0), "max_loss_points", {})
    assert "layers" not in str(caught.value)
    assert "[refine]" in caught.value.hint


def test_a_loss_is_described_with_its_evidence() -> None:
    assert describe_loss(make_fidelity("a", 0.9)) == (
        "a: 10.0 points of agreement (agrees on 90.0 % of 50 calibration answers)"
    )
