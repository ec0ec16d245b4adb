"""What a model's answers are taken for."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from rankship_pipeline.evaluate.judging import Judging, Known, decide_judging
from rankship_pipeline.evaluate.likelihood import Answer, Family
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.quality import QualityKind
from rankship_pipeline.models.outputs import Outputs
from rankship_pipeline.recipe.choices import QualityChoice, Task

N, P = 12, 6
LOGITS, COLUMN, TOKENS = torch.randn(N, 5), torch.randn(N, 1), torch.randn(N, P, 7)
MAPS, UNIT = torch.randn(N, 4, 3, 3), normalize(torch.randn(N, 8), dim=-1)
CLASSES, ZEROS = torch.arange(N) % 5, torch.zeros(N, dtype=torch.int64)
IDS = torch.arange(N * P).reshape(N, P) % 7
NEXT = pad(IDS[:, 1:], (0, 1), value=-100)


def decide(
    outputs: Tensor | Outputs, labels: Tensor | None, choice: QualityChoice | None = None, task: Task | None = None
) -> Judging:
    named = {"output": outputs} if isinstance(outputs, Tensor) else outputs
    return decide_judging(Known(choice=choice or QualityChoice(), task=task), named, labels, (IDS,))


@pytest.mark.parametrize(
    ("output", "labels", "kind", "answer"),
    [
        (LOGITS, CLASSES, "classification", Answer()),
        (LOGITS.softmax(-1), CLASSES, "classification", Answer(family="probabilities")),
        (LOGITS.log_softmax(-1), CLASSES, "classification", Answer()),
        (TOKENS, CLASSES[:, None].repeat(1, P), "token-classification", Answer()),
        (TOKENS, NEXT, "language-model", Answer()),
        (MAPS, ZEROS[:, None, None].repeat(1, 3, 3), "dense-map", Answer(axis=1)),
        (MAPS.movedim(1, -1), torch.ones(N, 3, 3).long(), "dense-map", Answer(axis=-1)),
        (COLUMN, torch.randn(N), "regression", Answer(family="values")),
        (COLUMN, torch.randn(N, 1), "regression", Answer(family="values")),
        (COLUMN, torch.arange(N), "regression", Answer(family="values")),
        (COLUMN, torch.arange(N) % 2, "classification", Answer(family="binary logits")),
        (LOGITS, (LOGITS > 0).float(), "classification", Answer(family="binary logits")),
        (LOGITS, LOGITS + 1, "regression", Answer(family="values")),
        (MAPS[:, :1], (MAPS[:, 0] > 0).long(), "dense-map", Answer(family="binary logits")),
        (MAPS[:, :1], MAPS[:, 0], "regression", Answer(family="values", axis=1)),
        (UNIT, UNIT.flip(0), "embedding", Answer(family="values")),
        (MAPS, MAPS + 1, "regression", Answer(family="values", axis=1)),
    ],
)
def test_labels_and_outputs_say_what_is_asked(
    output: Tensor, labels: Tensor, kind: QualityKind, answer: Answer
) -> None:
    found = decide(output, labels)
    assert (found.kind, found.answer, found.labelled) == (kind, answer, True)


@pytest.mark.parametrize(
    ("output", "kind", "family"),
    [
        (LOGITS, "fidelity", "values"),
        (COLUMN, "fidelity", "values"),
        (LOGITS.softmax(-1), "fidelity", "probabilities"),
        (UNIT, "embedding", "values"),
        (MAPS, "fidelity", "values"),
    ],
)
def test_without_labels_outputs_are_classes_scores_only_on_evidence(
    output: Tensor, kind: QualityKind, family: Family
) -> None:
    found = decide(output, None)
    assert (found.kind, found.answer.family, found.labelled) == (kind, family, False)
    assert decide({"logits": LOGITS}, None).answer.family == "logits"
    assert decide(LOGITS, None, QualityChoice(kind="classification")).answer.family == "logits"
    assert decide(LOGITS, None, task="sequence-classification").answer.family == "logits"


@pytest.mark.parametrize("output", [COLUMN, UNIT])
def test_labels_that_are_all_the_same_are_no_classes_of_numbers(output: Tensor) -> None:
    found = decide(output, ZEROS)
    assert not found.labelled
    assert not found.answer.is_choice
    assert "all are the same" in found.note
    assert not decide(output, None).note


def test_labels_belong_to_the_output_that_they_fit_or_to_the_named_one() -> None:
    outputs = {"features": UNIT, "scores": LOGITS, "other": LOGITS + 1, "size": torch.randn(N)}
    found = decide(outputs, torch.randn(N))
    assert found.judged == ("size",)
    assert found.outputs == tuple(outputs)
    named = decide(outputs, CLASSES, QualityChoice(output="other"))
    assert named.judged == ("other",)
    assert named.likelihood["features"].family == "values"
    with pytest.raises(InputError, match="names 'none', the model gives features of shape"):
        decide(outputs, CLASSES, QualityChoice(output="none"))


def test_a_span_has_two_outputs() -> None:
    ends = {"start_logits": torch.randn(N, P), "end_logits": torch.randn(N, P)}
    found = decide(ends, torch.ones(N, 2).long())
    assert (found.kind, found.judged, found.labelled) == ("question-answering", ("start_logits", "end_logits"), True)
    assert decide(ends, None, task="question-answering").kind == "fidelity"
    with pytest.raises(InputError, match=r"whole numbers \(samples, 2\)"):
        decide(ends, torch.ones(N).long())


def test_shares_are_probabilities_only_where_the_model_gives_no_other_numbers() -> None:
    labels = torch.arange(N) % 2
    assert decide(COLUMN.sigmoid(), labels).answer.family == "binary logits"
    known = Known(bounded=("output",))
    assert decide_judging(known, {"output": COLUMN.sigmoid()}, labels, ()).answer.family == "binary probabilities"


def test_a_classifier_of_one_column_is_a_regression_whatever_its_task_is_called() -> None:
    assert decide(COLUMN, torch.randn(N), task="sequence-classification").kind == "regression"


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.arange(N), "test_labels run from 0 to 11, the model has 5 classes"),
        (torch.full((N,), -100), "test_labels run from -1 to -1"),
        (torch.randn(N, 4), "fit no output of the model: it gives output of shape"),
        (torch.zeros(N, 9).long(), "fit no output"),
    ],
)
def test_labels_that_fit_nothing_are_refused(labels: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        decide(LOGITS, labels)


def test_a_regression_on_labels_that_are_all_the_same_is_refused_before_long_work() -> None:
    with pytest.raises(InputError, match="all test labels are the same"):
        decide(COLUMN, torch.ones(N), QualityChoice(kind="regression"))


def test_a_model_of_whole_numbers_is_refused() -> None:
    with pytest.raises(InputError, match="no floating-point tensor"):
        decide(CLASSES, None)
