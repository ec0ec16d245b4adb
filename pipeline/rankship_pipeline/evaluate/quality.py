"""Scores a model by what its answers are: one function and one measure for each kind of quality."""

from collections.abc import Callable, Mapping
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from rankship_pipeline.evaluate.accuracy import (
    IGNORED,
    measure_accuracy,
    wilson_interval,
)
from rankship_pipeline.evaluate.calibrate import fit_batch, predict, split
from rankship_pipeline.evaluate.judging import Judging
from rankship_pipeline.evaluate.likelihood import Answer, find_shown, take_columns, take_logs
from rankship_pipeline.evaluate.likeness import measure_likeness
from rankship_pipeline.evaluate.masks import Masks, find_masks, pick_mask
from rankship_pipeline.evaluate.perplexity import Scores, join_scores, summarise
from rankship_pipeline.foundation.errors import InputError, MeasurementError
from rankship_pipeline.foundation.quality import ACCURACY, Measure, QualityKind, Score
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import Outputs, call

Function = Callable[[object, Tensor], float]  # a user's own score of all test outputs and labels
Target = Tensor | Outputs  # labels; or the dense model's outputs, where there are none
_MOST = 1e304  # perplexity: what a float can show
_BYTES = 2**27  # of one output in a batch
_EQUAL = 1e-12  # of a column's size: the spread of labels that are all the same
_MOST_PAIRED = 512  # samples whose pairwise similarities are ranked

MEASURES: Mapping[QualityKind, Measure] = {
    "classification": ACCURACY,
    "token-classification": ACCURACY,
    "question-answering": Measure(name="exact match"),
    "regression": Measure(name="R²", unit=""),
    "dense-map": Measure(name="mean IoU"),
    "embedding": Measure(name="cosine", unit=""),
    "language-model": Measure(name="perplexity", unit="", higher_is_better=False, points=False),
    "fidelity": Measure(name="relative error", higher_is_better=False),
}


@torch.inference_mode()
def score(model: nn.Module, inputs: Inputs, target: Target, judging: Judging, stage: str) -> Score:
    """The model's score on test inputs: by their labels, or by the dense model's outputs where there are none."""
    found = SCORERS[judging.kind](model, inputs, target, judging, stage)
    figures = [found.value, *found.also.values()]
    if not all(isfinite(one) for one in figures):
        raise MeasurementError(
            f"{stage}: {found.measure.name} is {found.value}", hint="look for NaN or overflow in the model's outputs"
        )
    return found


@torch.inference_mode()
def score_by_function(
    function: Function, measure: Measure, model: nn.Module, inputs: Inputs, labels: Tensor | None, stage: str
) -> Score:
    """The user's own score: of the one output, or of all outputs by name; without labels it gets None."""
    outputs = predict(model, inputs)
    given: object = next(iter(outputs.values())) if len(outputs) == 1 else outputs
    found = function(given, labels)  # type: ignore[arg-type]  # None where the user gives no labels
    try:
        value = float(found)
    except (TypeError, ValueError):
        raise InputError(
            f"{measure.name} gave a {type(found).__name__}", hint="return one number from quality.function"
        ) from None
    if not isfinite(value):
        raise MeasurementError(f"{stage}: {measure.name} is {value}", hint="return a finite number")
    return Score(stage=stage, samples=len(inputs[0]), value=value, measure=measure)


def _score_classes(model: nn.Module, inputs: Inputs, target: Target, judging: Judging, stage: str) -> Score:
    return measure_accuracy(
        model, inputs, _take_labels(target), stage=stage, output=judging.judged[0], answer=judging.answer
    )


def _score_text(model: nn.Module, inputs: Inputs, target: Target, judging: Judging, stage: str) -> Score:
    """exp(mean −ln p) of the tokens that count, with its interval over the samples (tokens of one are alike)."""
    labels, name, scores = _take_labels(target), judging.judged[0], list[Scores]()
    needed = call(model, tuple(tensor[:1] for tensor in inputs))[name].nbytes
    for *batch, wanted in split((*inputs, labels), fit_batch(needed, _BYTES)):
        logs = take_logs(call(model, batch)[name], judging.answer)  # (samples, positions, vocabulary)
        losses = nll_loss(logs.transpose(1, -1), wanted.long(), ignore_index=IGNORED, reduction="none")
        counted = wanted != IGNORED
        right = (logs.argmax(-1) == wanted) & counted
        scores.append(Scores(losses.double().flatten(1).sum(1), counted.flatten(1).sum(1), right.flatten(1).sum(1)))
    found = summarise(join_scores(scores), labels.shape[1])
    correct = sum(int(one.hits.sum()) for one in scores)
    low, high = (None if one is None else min(one, _MOST) for one in (found.low, found.high))
    return Score(
        stage=stage,
        samples=found.scored_tokens,
        value=min(found.perplexity, _MOST),
        low=low,
        high=high,
        measure=MEASURES["language-model"],
        correct=correct,
        cross_entropy=found.mean_nll_nats,
        also={"accuracy": correct / found.scored_tokens},
    )


def _score_spans(model: nn.Module, inputs: Inputs, target: Target, judging: Judging, stage: str) -> Score:
    """The share of questions whose answer's first and last token are both right."""
    exact, ends, samples = 0, 0, 0
    for *batch, spans in split((*inputs, _take_labels(target))):
        outputs = call(model, batch)
        masks = find_masks(model, tuple(batch))
        chosen = torch.stack([_hide(outputs[name], masks).argmax(-1) for name in judging.judged], 1)
        right = chosen == spans
        exact += int(right.all(1).sum())
        ends += int(right.sum())
        samples += len(spans)
    low, high = wilson_interval(exact, samples)
    return Score(
        stage=stage,
        samples=samples,
        value=exact / samples,
        low=low,
        high=high,
        measure=MEASURES["question-answering"],
        correct=exact,
        also={"ends that are right": ends / (2 * samples)},
    )


def _hide(scores: Tensor, masks: Masks) -> Tensor:
    """Scores of positions (samples, positions) without those of padding."""
    mask = pick_mask(masks, scores.shape)
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _score_maps(model: nn.Module, inputs: Inputs, target: Target, judging: Judging, stage: str) -> Score:
    """Intersection over union of every class that occurs, in labels or predictions, averaged over the classes."""
    answer, name = judging.answer, judging.judged[0]
    confused: Tensor | None = None
    for *batch, labels in split((*inputs, _take_labels(target))):
        logs = take_logs(call(model, batch)[name], answer)  # (samples, height, width, classes)
        classes = logs.shape[-1]
        wanted, chosen = labels.flatten().long(), logs.argmax(-1).flatten()
        counted = wanted != IGNORED
        pairs = torch.bincount(wanted[counted] * classes + chosen[counted], minlength=classes**2)
        confused = pairs if confused is None else confused + pairs
    matrix = torch.zeros(1, 1) if confused is None else confused.view(classes, classes).double()  # (label, predicted)
    both, either = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    shares = (both / either.clamp_min(1))[either > 0]
    return Score(
        stage=stage,
        samples=int(matrix.sum()),
        value=float(shares.mean()),
        measure=MEASURES["dense-map"],
        correct=int(both.sum()),
        also={"pixel accuracy": float(both.sum() / matrix.sum().clamp_min(1))},
    )


def _score_numbers(model: nn.Module, inputs: Inputs, target: Target, judging: Judging, stage: str) -> Score:
    """R² = 1 − Σ(y − t)² / Σ(t − t̄)², the mean over the columns; a column of equal labels does not count."""
    own, wanted = _gather_columns(model, inputs, target, judging)
    errors, spread = (own - wanted).square().sum(0), (wanted - wanted.mean(0)).square().sum(0)
    sizes = wanted.square().sum(0)
    counted = spread > _EQUAL * sizes
    if not bool(counted.any()):
        raise InputError(
            "R² is not defined: all test labels are the same",
            hint="give labels that differ; or none, to judge by the distance from the dense model",
        )
    relative = (errors / sizes.clamp_min(1e-300)).sqrt()[sizes > 0]
    return Score(
        stage=stage,
        samples=len(wanted),
        value=float((1 - errors[counted] / spread[counted]).mean()),
        measure=MEASURES["regression"],
        also={"relative error": float(relative.mean())},
    )


def _score_vectors(model: nn.Module, inputs: Inputs, target: Target, judging: Judging, stage: str) -> Score:
    """The mean cosine between outputs and targets, and how alike they rank the samples' similarities (Spearman)."""
    own, wanted = _gather_columns(model, inputs, target, judging)
    return Score(
        stage=stage,
        samples=len(wanted),
        value=float(torch.cosine_similarity(own, wanted, -1).mean()),
        measure=MEASURES["embedding"],
        also={"rank correlation": _correlate_ranks(own[:_MOST_PAIRED], wanted[:_MOST_PAIRED])},
    )


def _correlate_ranks(own: Tensor, wanted: Tensor) -> float:
    """Spearman's correlation between both sides' cosines of all pairs of rows; 1 where there are too few to differ."""
    from scipy.stats import spearmanr

    upper = torch.triu_indices(len(own), len(own), 1)
    left, right = (
        (unit @ unit.T)[upper[0], upper[1]].numpy()
        for unit in (nn.functional.normalize(one, dim=-1) for one in (own, wanted))
    )
    if len(left) < 2 or left.std() == 0 or right.std() == 0:  # noqa: PLR2004 - a correlation needs two
        return 1.0
    return float(spearmanr(left, right).statistic)


def _score_distance(model: nn.Module, inputs: Inputs, target: Target, judging: Judging, stage: str) -> Score:
    """The error of the outputs as a share of their own spread; of the output where it is worst."""
    reference = target if isinstance(target, dict) else {judging.judged[0]: target}
    counted = {name: answer for name, answer in judging.likelihood.items() if name in reference}
    alike = measure_likeness(model, inputs, reference, counted)
    return Score(
        stage=stage,
        samples=len(inputs[0]),
        value=alike.error,
        measure=MEASURES["fidelity"],
        also={"top-1 agreement": alike.agreed / alike.answers} if alike.answers else {},
    )


def _gather_columns(model: nn.Module, inputs: Inputs, target: Target, judging: Judging) -> tuple[Tensor, Tensor]:
    """The judged output and its targets as rows (answers, columns) in float64, without masked positions."""
    name, values = judging.judged[0], Answer(family="values", axis=judging.answer.axis)
    wanted = target[name] if isinstance(target, dict) else target
    pairs = []
    for *batch, part in split((*inputs, wanted)):
        own, masks = call(model, batch)[name], find_masks(model, tuple(batch))
        both = [take_columns(one.double(), values) for one in (own, part.reshape(own.shape))]
        mask = find_shown(both[0], masks)
        pairs.append([one.flatten(0, -2) if mask is None else one[mask] for one in both])
    left, right = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    return left, right


def _take_labels(target: Target) -> Tensor:
    if isinstance(target, dict):  # decide_judging judges by the dense model's outputs only what has a distance
        message = "classes are judged by labels"
        raise TypeError(message)
    return target


Scorer = Callable[[nn.Module, Inputs, Target, Judging, str], Score]
SCORERS: Mapping[QualityKind, Scorer] = {
    "classification": _score_classes,
    "token-classification": _score_classes,
    "question-answering": _score_spans,
    "regression": _score_numbers,
    "dense-map": _score_maps,
    "embedding": _score_vectors,
    "language-model": _score_text,
    "fidelity": _score_distance,
}
