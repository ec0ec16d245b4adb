"""How a model's outputs are distributed, so that an error in any output is counted in nats, whatever its units.

Classes' scores are categorical. All other numbers are Gaussian around the dense model's, with the standard deviation of
the dense model's own outputs, column by column: a column in metres weighs as it would in millimetres. An output's nats
are a mean over its columns, so that an embedding of 512 numbers does not outweigh ten classes.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from rankship_pipeline.evaluate.masks import Masks, pick_mask
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.models.outputs import Outputs

Family = Literal["logits", "probabilities", "binary logits", "binary probabilities", "values"]
_POSITIONS = 3  # dimensions of (samples, positions, classes or columns)
IMAGE = 4  # dimensions of (samples, channels, height, width)
_LEAST = 1e-30  # a probability whose logarithm float32 still holds
_FLOOR = 1e-6  # of a column's mean square: the least variance that it counts with
# Up to this many classes or columns the Fisher is summed over all; beyond, that many are drawn per output.
_DRAWS = 10


@record
class Answer:
    """What the numbers of one output are; `axis` is that of its classes, or of its columns.

    A binary output has one number for each yes-or-no answer, and no axis of classes.
    """

    family: Family = "logits"
    axis: int = -1

    @property
    def is_choice(self) -> bool:
        """Whether the answer is one of several classes."""
        return self.family != "values"


Likelihood = Mapping[str, Answer]  # the outputs that count, by name


def assume_logits(outputs: Outputs) -> Likelihood:
    """Every output of floating-point numbers as logits, its classes last."""
    return {name: Answer() for name, one in outputs.items() if one.is_floating_point()}


def take_logs(output: Tensor, answer: Answer) -> Tensor:
    """The logarithms of classes' probabilities (…, classes) of an output that holds their scores."""
    if answer.family == "logits":
        return output.movedim(answer.axis, -1).log_softmax(-1)
    if answer.family == "probabilities":
        return output.movedim(answer.axis, -1).clamp_min(_LEAST).log()
    one = output.flatten(-2) if output.ndim == 2 and output.shape[-1] == 1 else output  # noqa: PLR2004 - one column
    if answer.family == "binary logits":
        return torch.stack([torch.zeros_like(one), one], -1).log_softmax(-1)
    return torch.stack([1 - one, one], -1).clamp_min(_LEAST).log()


def take_columns(output: Tensor, answer: Answer) -> Tensor:
    """An output of other numbers with its columns last: (…, columns); (samples,) is one column."""
    return output[:, None] if output.ndim == 1 else output.movedim(answer.axis, -1)


def measure_scales(outputs: Outputs, likelihood: Likelihood) -> Outputs:
    """The standard deviation of each column, (columns,), of the outputs that are no classes' scores.

    A column that hardly varies counts with a thousandth of its size, one that is zero with one.
    """
    scales = {}
    for name, answer in likelihood.items():
        if answer.is_choice:
            continue
        columns = take_columns(outputs[name].double(), answer).flatten(0, -2)
        variance = columns.var(0, correction=0) + _FLOOR * columns.square().mean(0)
        scales[name] = torch.where(variance > 0, variance, 1).sqrt()
    return scales


def take_answers(
    student: Outputs, teacher: Outputs, likelihood: Likelihood, masks: Masks
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name and both models' answers of each output, (answers, classes or columns), no masked positions.

    Classes' scores come as logarithms of probabilities.
    """
    for name, answer in likelihood.items():
        take = take_logs if answer.is_choice else take_columns
        pair = [take(one, answer) for one in (student[name], teacher[name])]
        mask = find_shown(pair[0], masks)
        own, wanted = (one.flatten(0, -2) if mask is None else one[mask] for one in pair)
        yield name, own, wanted


def find_shown(answers: Tensor, masks: Masks) -> Tensor | None:
    """The mask of answers of positions (samples, positions, classes or columns); None for any others."""
    return pick_mask(masks, answers.shape) if answers.ndim == _POSITIONS else None


def sum_nats(own: Tensor, wanted: Tensor, scale: Tensor | None) -> Tensor:
    """The divergence in nats, summed over answers (answers, classes or columns): of logarithms without a `scale`."""
    if scale is None:
        return kl_div(own, wanted, log_target=True, reduction="sum")
    return ((own - wanted) / scale.to(own.dtype)).square().mean(-1).sum() / 2


def draw_predictions(
    outputs: Outputs, likelihood: Likelihood, scales: Outputs, masks: Masks, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield scalars whose gradients' outer products sum to the Fisher information of all outputs.

    Of several outputs, each counts per answer, as in the divergence; a single one counts as often as it has answers.
    """
    for name, answer in likelihood.items():
        if not outputs[name].requires_grad:
            continue  # no layer affects it
        draw = _draw_classes if answer.is_choice else _draw_columns
        taken = (take_logs if answer.is_choice else take_columns)(outputs[name], answer)
        mask = find_shown(taken, masks)
        shown = torch.ones(taken.shape[:-1]).bool() if mask is None else mask
        answers = int(shown.sum()) / len(taken) if len(likelihood) > 1 else 1
        for scalar in draw(taken, scales.get(name), shown, generator):
            yield scalar if answers == 1 else scalar / max(answers, 1) ** 0.5


def _draw_classes(logs: Tensor, _scale: Tensor | None, shown: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Over all classes, weighted by their probabilities, or over labels that are drawn."""
    chances = logs.detach().exp()
    if logs.ndim == 2 and logs.shape[-1] <= _DRAWS:  # noqa: PLR2004 - a classifier's
        for index in range(logs.shape[-1]):
            yield (chances[:, index].sqrt() * logs[:, index]).sum()
        return
    for _ in range(_DRAWS):
        labels = torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(*logs.shape[:-1], 1)
        yield logs.gather(-1, labels).squeeze(-1)[shown].sum() / _DRAWS**0.5


def _draw_columns(y: Tensor, scale: Tensor | None, shown: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Over all columns of one row a sample, or along directions that are drawn."""
    weights = 1 / (y.new_ones(y.shape[-1]) if scale is None else scale.to(y.dtype)) / y.shape[-1] ** 0.5
    if y.ndim == 2 and y.shape[-1] <= _DRAWS:  # noqa: PLR2004 - (samples, columns)
        for index in range(y.shape[-1]):
            yield (y[:, index] * weights[index]).sum()
        return
    for _ in range(_DRAWS):
        directions = torch.randn(y.shape, generator=generator, dtype=y.dtype)
        yield (y * weights * directions)[shown].sum() / _DRAWS**0.5
