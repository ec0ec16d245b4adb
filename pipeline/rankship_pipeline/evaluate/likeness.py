"""Measures how alike the outputs of two models are, in one pass of both over the samples."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import fit_batch, split
from rankship_pipeline.evaluate.likelihood import LEAST_VARIANCE, Answer, Likelihood, take_answers
from rankship_pipeline.evaluate.masks import find_masks
from rankship_pipeline.evaluate.remembered import Remembered
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import has_hooks
from rankship_pipeline.models.outputs import Outputs, call

_BYTES = 2**26  # of one model's outputs in a batch, which are several times as many in float64


@record
class Likeness:
    """How alike two models' outputs are.

    `agreed` of the `answers` (see measure_divergence) have the same class; both are 0 where no output holds classes'
    scores. `error` is the root of the mean squared difference of every column over that column's variance, of the
    output where it is worst. Classes' scores are taken as numbers there too: it is the distance of the outputs, not of
    what follows from them.
    """

    agreed: int
    answers: int
    error: float


@torch.inference_mode()
def measure_likeness(model: nn.Module, inputs: Inputs, other: nn.Module | Outputs, likelihood: Likelihood) -> Likeness:
    """How alike a model's outputs are to those of another, which stand for the truth and may be given instead."""
    choices = {name: answer for name, answer in likelihood.items() if answer.is_choice}
    plain = {name: Answer(family="values", axis=answer.axis) for name, answer in likelihood.items()}
    sums = {name: _Sums() for name in likelihood}
    agreed = answers = 0
    same = isinstance(other, nn.Module) and are_same(model, other)  # as where one model alone is "merged"
    for batch, wanted in _answer(other, inputs):
        own, masks = wanted if same else call(model, batch), find_masks(model, batch)
        for _, mine, theirs in take_answers(own, wanted, choices, masks):
            agreed += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
            answers += len(mine)
        for name, mine, theirs in take_answers(own, wanted, plain, masks):
            sums[name].add(mine.double(), theirs.double())
    return Likeness(agreed=agreed, answers=answers, error=max(one.find_error() for one in sums.values()))


def _answer(other: nn.Module | Outputs, inputs: Inputs) -> Iterator[tuple[Inputs, Outputs]]:
    """Yield batches of the inputs with the other model's outputs."""
    if isinstance(other, nn.Module):
        needed = sum(one.nbytes for one in call(other, tuple(tensor[:1] for tensor in inputs)).values())
        for batch in split(inputs, fit_batch(needed, _BYTES)):
            yield batch, call(other, batch)
        return
    for both in split((*inputs, *other.values())):
        yield both[: len(inputs)], dict(zip(other, both[len(inputs) :], strict=True))


def are_same(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models are of one kind with the same tensors, and nothing hooked to them that changes outputs."""
    model, other = (one.module if isinstance(one, Remembered) else one for one in (model, other))
    if any(has_hooks(module) for one in (model, other) for module in one.modules()):
        return False
    states = model.state_dict(), other.state_dict()
    return (
        type(model) is type(other)
        and states[0].keys() == states[1].keys()
        and all(torch.equal(one, states[1][name]) for name, one in states[0].items())
    )


@dataclass
class _Sums:
    """Sums over answers, column by column (columns,)."""

    count: int = 0
    values: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    errors: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def add(self, mine: Tensor, theirs: Tensor) -> None:
        """Add the answers of a batch, (answers, columns)."""
        self.count += len(mine)
        self.values = self.values + theirs.sum(0)
        self.squares = self.squares + theirs.square().sum(0)
        self.errors = self.errors + (mine - theirs).square().sum(0)

    def find_error(self) -> float:
        """The root of the mean, over columns, of the mean squared difference over the variance."""
        count = max(1, self.count)
        energy = self.squares / count
        variance = (energy - (self.values / count).square()).clamp_min(0) + LEAST_VARIANCE * energy
        return sqrt(float((self.errors / count / torch.where(variance > 0, variance, 1)).mean()))
