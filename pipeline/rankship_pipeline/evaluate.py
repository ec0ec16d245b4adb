"""How well a classifier does on the test inputs."""

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from rankship_pipeline.calibrate import split
from rankship_pipeline.data import Inputs
from rankship_pipeline.records import Accuracy

_Z95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


@torch.inference_mode()
def predict(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's outputs (samples, classes), batch by batch."""
    return torch.cat([model(*batch) for batch in split(inputs)])


def measure_divergence(model: nn.Module, inputs: Inputs, teacher: Tensor) -> float:
    """Mean Kullback-Leibler divergence from the teacher's logits (samples, classes) to the model's, in nats."""
    student = torch.log_softmax(predict(model, inputs), -1)
    return float(kl_div(student, torch.log_softmax(teacher, -1), log_target=True, reduction="batchmean"))


def measure_accuracy(model: nn.Module, inputs: Inputs, labels: Tensor, *, stage: str) -> Accuracy:
    """Top-1 accuracy on labelled test inputs."""
    correct = int((predict(model, inputs).argmax(1) == labels).sum())
    low, high = wilson_interval(correct, len(labels))
    return Accuracy(stage=stage, samples=len(labels), correct=correct, low=low, high=high)


def wilson_interval(successes: int, trials: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): honest near 0 and 1, where the normal one is not."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
