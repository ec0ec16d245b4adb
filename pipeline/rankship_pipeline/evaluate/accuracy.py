"""Measures a model's accuracy on test inputs, and its distance from another model."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from rankship_pipeline.evaluate.calibrate import find_mask, split
from rankship_pipeline.foundation.records import Accuracy
from rankship_pipeline.models.data import Inputs

IGNORED = -100  # the label that torch's cross-entropy ignores: for padding and the last token


@torch.inference_mode()
def predict(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's outputs (samples, classes) or (samples, positions, classes), batch by batch."""
    return torch.cat([model(*batch) for batch in split(inputs)])


@torch.inference_mode()
def measure_divergence(model: nn.Module, inputs: Inputs, teacher: Tensor) -> float:
    """Mean Kullback-Leibler divergence from the teacher's logits to the model's, in nats per answer.

    An answer is a sample, or a position of a language model that its attention mask does not hide.
    """
    total, answers = 0.0, 0
    for student, wanted in _pair_answers(model, inputs, teacher):
        logs = torch.log_softmax(student, -1), torch.log_softmax(wanted, -1)
        total += float(kl_div(*logs, log_target=True, reduction="sum"))
        answers += len(student)
    return total / answers


@torch.inference_mode()
def measure_agreement(model: nn.Module, inputs: Inputs, teacher: Tensor) -> tuple[int, int]:
    """The number of answers (see measure_divergence) with the teacher's class, and the number of all answers."""
    agreed, answers = 0, 0
    for student, wanted in _pair_answers(model, inputs, teacher):
        agreed += int((student.argmax(-1) == wanted.argmax(-1)).sum())
        answers += len(student)
    return agreed, answers


def _pair_answers(model: nn.Module, inputs: Inputs, teacher: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the model's and the teacher's logits (answers, classes) per batch, without masked positions."""
    for *batch, expected in split((*inputs, teacher)):
        student, mask = model(*batch), find_mask(model, tuple(batch))
        if student.ndim == 2:  # noqa: PLR2004 - (samples, classes), else (samples, positions, classes)
            yield student, expected
        elif mask is None:
            yield student.flatten(0, 1), expected.flatten(0, 1)
        else:
            yield student[mask], expected[mask]


@torch.inference_mode()
def measure_accuracy(model: nn.Module, inputs: Inputs, labels: Tensor, *, stage: str) -> Accuracy:
    """Top-1 accuracy and cross-entropy on labels (samples,) or (samples, positions); label IGNORED does not count."""
    correct, answers, nats = 0, 0, 0.0
    for batch in split((*inputs, labels)):
        logits, wanted = model(*batch[:-1]).flatten(0, -2), batch[-1].flatten()
        counted = wanted != IGNORED
        correct += int((logits.argmax(-1)[counted] == wanted[counted]).sum())
        answers += int(counted.sum())
        nats += float(cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum"))
    low, high = wilson_interval(correct, answers)
    return Accuracy(stage=stage, samples=answers, correct=correct, low=low, high=high, cross_entropy=nats / answers)


def pool_accuracies(parts: Sequence[Accuracy], *, stage: str) -> Accuracy:
    """One accuracy over the answers of all parts."""
    samples, correct = sum(part.samples for part in parts), sum(part.correct for part in parts)
    low, high = wilson_interval(correct, samples)
    nats = sum(part.samples * (part.cross_entropy or 0.0) for part in parts) / samples
    return Accuracy(stage=stage, samples=samples, correct=correct, low=low, high=high, cross_entropy=nats)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), valid near 0 and 1, where the normal one is not."""
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
