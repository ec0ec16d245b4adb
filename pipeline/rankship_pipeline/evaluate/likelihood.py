"""How a model's outputs are distributed, so that an error in any output is counted in nats, whatever its units.

Classes' scores are categorical. All other numbers are Gaussian around the dense model's, with the standard deviation of
the dense model's own outputs, column by column: a column in metres weighs as it would in millimetres. An output's nats
are a mean over its columns, so that an embedding of 512 numbers does not outweigh ten classes.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from scipy.linalg import hadamard
from torch import Tensor
from torch.nn.functional import kl_div

from rankship_pipeline.evaluate.masks import Masks, pick_mask
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.models.outputs import Outputs

Family = Literal["logits", "probabilities", "binary logits", "binary probabilities", "values"]
_POSITIONS = 3  # dimensions of (samples, positions, classes or columns)
IMAGE = 4  # dimensions of (samples, channels, height, width)
_LEAST = 1e-30  # a probability whose logarithm float32 still holds
LEAST_VARIANCE = 1e-6  # of a column's mean square: the least variance that it counts with
_SUMMED = 2**22  # numbers that are summed in float64 at once
# The size of the Hadamard matrix: the most draws that make a difference, a power of two.
_EXACT = 16


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


def measure_scales(batches: Iterable[Outputs], likelihood: Likelihood) -> Outputs:
    """The standard deviation of each column, (columns,), of the outputs that are no classes' scores.

    A column that hardly varies counts with a thousandth of its size, one that is zero with one.
    """
    names = [name for name, answer in likelihood.items() if not answer.is_choice]
    sums: dict[str, _Sums] = {}
    for outputs in batches if names else ():
        for name in names:
            columns = take_columns(outputs[name], likelihood[name]).flatten(0, -2)
            sums.setdefault(name, _Sums(columns[0].double().clone())).add(columns)
    return {name: found.measure_scale() for name, found in sums.items()}


class _Sums:
    """Sums over the rows of columns (rows, columns), float64, around an `origin` (columns,) for exactness."""

    def __init__(self, origin: Tensor) -> None:
        self._origin, self._count = origin, 0
        self._first, self._second = torch.zeros_like(origin), torch.zeros_like(origin)

    def add(self, columns: Tensor) -> None:
        """Add rows, a part at a time: a language model's logits in float64 are twice the largest tensor there is."""
        for part in torch.split(columns, max(1, _SUMMED // columns.shape[1])):
            off = part.double() - self._origin
            self._first += off.sum(0)
            self._second += off.square_().sum(0)
        self._count += len(columns)

    def measure_scale(self) -> Tensor:
        """The standard deviations, (columns,), as `measure_scales` gives them."""
        off = self._first / self._count
        variance = (self._second / self._count - off.square()).clamp_min(0)
        variance += LEAST_VARIANCE * (variance + (self._origin + off).square())
        return torch.where(variance > 0, variance, 1).sqrt()


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
    outputs: Outputs,
    likelihood: Likelihood,
    scales: Outputs,
    masks: Masks,
    generator: torch.Generator,
    draws: int = 1,
) -> Iterator[Tensor]:
    """Yield `draws` scalars whose gradients' outer products sum, in expectation, to the Fisher information of outputs.

    A scalar is Σ_c s_c·√p_c·log p_c over classes, or over columns of other outputs in their own units, with signs s_c
    of ±1 drawn for every answer: E[s_c·s_c'] is 1 for c = c' and 0 otherwise, so that E[g·gᵀ] = Σ_c p_c·g_c·g_cᵀ. Along
    any direction the variance of one draw is below 2·F², F being the information along it, however rare the classes
    are that matter; labels drawn by their chances have no such bound (Hutchinson's trace estimator; Martens,
    Sutskever and Swersky 2012). The signs of several draws are rows of a Hadamard matrix, which makes the sum exact
    from as many draws as there are classes, at most _EXACT. Of several outputs, each counts per answer, as in the
    divergence; a single one counts as often as it has answers. Nothing is yielded where no layer affects an output.
    """
    rows = torch.from_numpy(hadamard(_EXACT))[:draws]
    taken = {name: _take_weighted(outputs[name], answer, scales.get(name)) for name, answer in likelihood.items()}
    weighted = {name: one for name, one in taken.items() if one.requires_grad}
    signs = {name: _draw_signs(one, generator) for name, one in weighted.items()}
    for name, one in weighted.items():
        mask = find_shown(one, masks)
        shown = torch.ones(one.shape[:-1], dtype=one.dtype) if mask is None else mask.to(one.dtype)
        answers = float(shown.sum()) / len(one) if len(likelihood) > 1 else 1.0
        signs[name] *= shown[..., None] / (max(answers, 1.0) * draws) ** 0.5
    for row in rows if weighted else ():
        yield torch.stack(
            [
                (one * (signs[name] * row.to(one.dtype).repeat(-(-one.shape[-1] // _EXACT))[: one.shape[-1]])).sum()
                for name, one in weighted.items()
            ]
        ).sum()


def _take_weighted(output: Tensor, answer: Answer, scale: Tensor | None) -> Tensor:
    """√p·log p of every class, with p held, or a column over its scale and the root of the number of columns."""
    if answer.is_choice:
        logs = take_logs(output, answer)
        return logs * (logs.detach() / 2).exp()
    y = take_columns(output, answer)
    units = y.new_ones(1) if scale is None else scale.to(y.dtype)
    weighted: Tensor = y / units / y.shape[-1] ** 0.5
    return weighted


def _draw_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """±1 in the shape and type of a tensor."""
    signs: Tensor = torch.empty_like(like, requires_grad=False).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    return signs
