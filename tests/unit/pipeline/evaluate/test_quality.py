"""Scores of every kind, against their definitions."""

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import jaccard_score, r2_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from rankship_pipeline.evaluate.judging import Judging
from rankship_pipeline.evaluate.likelihood import Answer
from rankship_pipeline.evaluate.quality import MEASURES, SCORERS, score, score_by_function
from rankship_pipeline.foundation.errors import InputError, MeasurementError
from rankship_pipeline.foundation.quality import Measure, QualityKind, Score

SAME = nn.Identity()


def judge(kind: QualityKind, answer: Answer, *judged: str) -> Judging:
    names = judged or ("output",)
    return Judging(kind=kind, judged=names, outputs=names, likelihood=dict.fromkeys(names, answer), labelled=True)


def rate(kind: QualityKind, output: Tensor, target: Tensor, answer: Answer | None = None) -> Score:
    return score(SAME, (output,), target, judge(kind, answer or Answer()), "s")


def test_every_kind_has_a_scorer_and_a_measure() -> None:
    assert set(SCORERS) == set(MEASURES)


def test_r2_is_the_mean_over_columns_and_knows_no_units() -> None:
    target = torch.randn(200, 3)
    output = target + torch.tensor([0.1, 0.5, 1.0]) * torch.randn(200, 3)
    units = torch.tensor([1.0, 1e3, 1e-3])
    values = Answer(family="values")
    found = rate("regression", output * units, target * units, values)
    assert found.value == pytest.approx(r2_score(target, output), abs=1e-5)
    assert found.show() == f"{found.value:.4g}"
    relative = (output - target).square().sum(0) / target.square().sum(0)
    assert found.also["relative error"] == pytest.approx(float(relative.sqrt().mean()), rel=1e-5)
    with pytest.raises(InputError, match="all test labels are the same"):
        rate("regression", output, torch.ones(200, 3), values)


def test_a_map_is_judged_by_intersection_over_union() -> None:
    output, labels = torch.randn(70, 4, 3, 5), torch.randint(0, 4, (70, 3, 5))
    found = rate("dense-map", output, labels, Answer(axis=1))
    chosen = output.argmax(1)
    expected = jaccard_score(labels.flatten(), chosen.flatten(), average="macro")
    assert found.value == pytest.approx(expected, abs=1e-6)
    assert found.also["pixel accuracy"] == pytest.approx(float((labels == chosen).float().mean()), abs=1e-6)
    hidden = labels.clone()
    hidden[:, 0] = -100
    assert rate("dense-map", output, hidden, Answer(axis=1)).samples == 70 * 2 * 5


def test_a_language_model_is_judged_by_perplexity_and_lower_is_better() -> None:
    logits, labels = torch.randn(9, 6, 11), torch.randint(0, 11, (9, 6))
    labels[:, -1] = -100
    found = rate("language-model", logits, labels)
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).exp()
    assert found.value == pytest.approx(float(expected), rel=1e-5)
    assert found.measure.find_loss(10.0, 11.0) == pytest.approx(10), "per cent of the perplexity before"


class Span(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"start_logits": x[:, 0], "end_logits": x[:, 1]}


def test_a_span_is_right_where_both_ends_are() -> None:
    ends = torch.tensor([[0, 1], [2, 2], [1, 3]])
    x = nn.functional.one_hot(torch.tensor([[0, 1], [2, 3], [1, 3]]), 4).float()
    found = score(Span(), (x,), ends, judge("question-answering", Answer(), "start_logits", "end_logits"), "s")
    assert (found.correct, found.samples) == (2, 3)
    assert found.also["ends that are right"] == pytest.approx(5 / 6)


def test_embeddings_are_judged_by_cosine_and_the_order_of_similarities() -> None:
    target = normalize(torch.randn(40, 8), dim=-1)
    output = 3 * target + 0.3 * torch.randn(40, 8)
    found = rate("embedding", output, target, Answer(family="values"))
    assert found.value == pytest.approx(float(torch.cosine_similarity(output, target).mean()), abs=1e-6)
    upper = torch.triu_indices(40, 40, 1)
    left, right = ((one @ one.T)[upper[0], upper[1]] for one in (normalize(output, dim=-1), target))
    assert found.also["rank correlation"] == pytest.approx(spearmanr(left, right).statistic, abs=1e-4)


def test_without_labels_the_dense_models_outputs_are_the_measure() -> None:
    dense = torch.randn(300, 4) * 50
    found = score(
        SAME, (dense + 5 * torch.randn(300, 4),), {"output": dense}, judge("fidelity", Answer(family="values")), "s"
    )
    assert found.value == pytest.approx(0.1, rel=0.15)
    assert not found.measure.higher_is_better
    assert found.measure.find_loss(0.0, found.value) == pytest.approx(100 * found.value)


def test_a_score_of_ones_own_gets_outputs_and_labels() -> None:
    measure = Measure(name="worst", unit="", higher_is_better=False, points=False)
    x, labels = torch.randn(70, 2), torch.randn(70, 2)
    found = score_by_function(lambda y, t: float((y - t).abs().max()), measure, SAME, (x,), labels, "s")  # type: ignore[operator]
    assert found.value == pytest.approx(float((x - labels).abs().max()))
    assert found.measure is measure
    named = score_by_function(lambda y, _: float(len(y)), measure, Span(), (torch.randn(5, 2, 3),), None, "s")  # type: ignore[arg-type]
    assert named.value == 2
    with pytest.raises(MeasurementError, match="worst is nan"):
        score_by_function(lambda _y, _t: float("nan"), measure, SAME, (x,), labels, "s")
    with pytest.raises(InputError, match="gave a str"):
        score_by_function(lambda _y, _t: "good", measure, SAME, (x,), labels, "s")  # type: ignore[arg-type,return-value]


def test_nan_is_no_score() -> None:
    with pytest.raises(MeasurementError, match="R² is nan"):
        rate("regression", torch.full((4, 1), float("nan")), torch.arange(4.0)[:, None], Answer(family="values"))
