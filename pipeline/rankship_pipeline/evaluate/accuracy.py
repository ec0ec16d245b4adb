"""Measures how often a model is right on test inputs, and its distance from another model."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from rankship_pipeline.evaluate.calibrate import fit_outputs, split
from rankship_pipeline.evaluate.likelihood import (
    Answer,
    Likelihood,
    assume_logits,
    measure_scales,
    sum_nats,
    take_answers,
    take_logs,
)
from rankship_pipeline.evaluate.masks import find_masks
from rankship_pipeline.foundation.quality import ACCURACY, Measure, Score
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import Outputs, call, flatten

IGNORED = -100  # the label that torch's cross-entropy ignores: for padding and the last token
Teacher = Tensor | Outputs  # another model's outputs; a bare tensor holds logits


@torch.inference_mode()
def measure_divergence(
    model: nn.Module,
    inputs: Inputs,
    teacher: Teacher,
    likelihood: Likelihood | None = None,
    scales: Outputs | None = None,
) -> float:
    """Mean divergence from the teacher's outputs to the model's, in nats per answer, added up over the outputs.

    It is Kullback and Leibler's between categorical distributions of classes, between Gaussian ones of other numbers
    (see likelihood.py), whose standard deviations are the `scales` (None: the teacher's). An answer is a sample, or a
    position that the model's attention mask does not hide.
    """
    teacher = flatten(teacher)
    likelihood = assume_logits(teacher) if likelihood is None else likelihood
    scales = measure_scales([teacher], likelihood) if scales is None else scales
    totals, counts = dict.fromkeys(likelihood, 0.0), dict.fromkeys(likelihood, 0)
    for name, own, wanted in _pair_answers(model, inputs, teacher, likelihood):
        totals[name] += float(sum_nats(own, wanted, scales.get(name)))
        counts[name] += len(own)
    return sum(total / max(1, counts[name]) for name, total in totals.items())


def _pair_answers(
    model: nn.Module, inputs: Inputs, teacher: Outputs, likelihood: Likelihood
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield both models' answers per batch and output, without masked positions (see likelihood.take_answers)."""
    if not likelihood:
        return
    names = list(likelihood)
    size = fit_outputs({name: teacher[name] for name in names})
    for both in split((*inputs, *(teacher[name] for name in names)), size):
        batch, expected = both[: len(inputs)], dict(zip(names, both[len(inputs) :], strict=True))
        yield from take_answers(call(model, batch), expected, likelihood, find_masks(model, batch))


@torch.inference_mode()
def measure_accuracy(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    *,
    stage: str,
    output: str | None = None,
    answer: Answer | None = None,
    measure: Measure = ACCURACY,
) -> Score:
    """The share of right answers, and cross-entropy, on labels of the output's shape without its axis of classes.

    `output` is the name of the output that holds the classes' scores (None: the first), as `answer` says. Label
    IGNORED does not count.
    """
    correct, answers, nats = 0, 0, 0.0
    answer = answer or Answer()
    for batch in split((*inputs, labels)):
        found = call(model, batch[:-1])
        logs = take_logs(found[output or next(iter(found))], answer).flatten(0, -2)
        wanted = batch[-1].flatten().long()
        counted = wanted != IGNORED
        correct += int((logs.argmax(-1)[counted] == wanted[counted]).sum())
        answers += int(counted.sum())
        nats += float(nll_loss(logs, wanted, ignore_index=IGNORED, reduction="sum"))
    return _state_accuracy(stage, correct, answers, nats / answers, measure)


def pool_accuracies(parts: Sequence[Score], *, stage: str) -> Score:
    """One accuracy over the answers of all parts."""
    samples, correct = sum(part.samples for part in parts), sum(part.correct or 0 for part in parts)
    nats = sum(part.samples * (part.cross_entropy or 0.0) for part in parts) / samples
    return _state_accuracy(stage, correct, samples, nats, ACCURACY)


def _state_accuracy(stage: str, correct: int, answers: int, nats: float, measure: Measure) -> Score:
    """The score of `correct` answers of all, with its interval; `nats` is the mean cross-entropy."""
    low, high = wilson_interval(correct, answers)
    return Score(
        stage=stage,
        samples=answers,
        value=correct / answers,
        low=low,
        high=high,
        measure=measure,
        correct=correct,
        cross_entropy=nats,
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), valid near 0 and 1, where the normal one is not."""
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
