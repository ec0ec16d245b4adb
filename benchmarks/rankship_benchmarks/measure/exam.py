"""A part of a recipe's test set that devices are examined with, and how their files' outputs are scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankship_pipeline.flow.judging import name_inputs
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.quality import Score

if TYPE_CHECKING:
    from rankship_pipeline.flow.judging import Court
    from rankship_pipeline.flow.prepared import Prepared


@dataclass(frozen=True, eq=False)
class Exam:
    """Test inputs and labels, samples first, evenly spaced over the `of` inputs of the recipe's test set.

    `names` are the inputs' names in the model's own code, by which masks of padding are found.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    of: int
    court: "Court"
    names: tuple[str, ...]

    def score(self, outputs: Sequence[Tensor], stage: str) -> Score:
        """Score outputs, in the file's order, as the recipe's final models are scored on the host."""
        return self.court.score_outputs(self.name(outputs), self.names, self.inputs, self.labels, stage)

    def name(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return outputs by the names that the model's own code gives them."""
        return dict(zip(self.court.judging.outputs, outputs, strict=True))

    def choose(self, outputs: Sequence[Tensor]) -> Tensor | None:
        """Return the class that each answer of the judged output chooses; None where it holds no classes' scores."""
        judged = self.court.judging.judged[0]
        axis = self.court.judging.classes.get(judged)
        return None if axis is None else self.name(outputs)[judged].argmax(axis).flatten()


def set_exam(prepared: "Prepared", samples: int) -> Exam:
    """Take so many of the recipe's test inputs, or all if there are fewer; InputError where nothing can be scored."""
    data, labels = prepared.data, prepared.data.test_labels
    why = (
        "its tasks have heads of their own" if data.tasks
        else "its files generate: `rankship eval` scores them" if prepared.generation is not None
        else "its data have no labels that fit an output" if prepared.court.needs_reference or labels is None
        else ""
    )  # fmt: skip
    if why or labels is None:
        message = f"recipe {prepared.recipe.name} cannot be scored on a device: {why}"
        raise InputError(message, hint="leave [accuracy] out of the suite")
    return _draw(prepared, labels, samples)


def set_whole_exam(prepared: "Prepared") -> Exam:
    """Take all of the recipe's test inputs; InputError where the data have no labels."""
    return _draw(prepared, prepared.data.labels, len(prepared.data.labels))


def _draw(prepared: "Prepared", labels: Tensor, samples: int) -> Exam:
    count = len(labels)
    places = torch.linspace(0, count - 1, min(samples, count)).round().long()
    inputs = tuple(tensor[places] for tensor in prepared.data.test_inputs)
    return Exam(
        inputs=inputs,
        labels=labels[places],
        of=count,
        court=prepared.court,
        names=name_inputs(prepared.model, inputs),
    )
