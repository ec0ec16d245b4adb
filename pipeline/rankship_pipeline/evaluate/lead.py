"""Which of two models is nearer to the dense ones, on as few samples as tell them apart."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.likelihood import Likelihood, assume_logits, measure_scales
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import Outputs, call

# Samples come in parts of so many. After so many parts at least, and whenever they have doubled, the rest is left out
# if chance would give either model such a lead with this probability.
_PART, _FEWEST, _DOUBT = 4, 4, 0.01
_SCALED = 16  # parts that tell the spread of outputs that are no classes' scores


@torch.inference_mode()
def measure_lead(
    first: nn.Module,
    second: nn.Module,
    teachers: Sequence[tuple[nn.Module, Inputs]],
    likelihood: Likelihood | None = None,
) -> float:
    """By how many nats the first model diverges more from the dense ones than the second (Student's t test).

    Each of the `teachers` is a dense model with its inputs, which are drawn in a random order that is the same each
    time. Their mean divergences add up (see measure_divergence), however many samples each has.
    """
    from scipy.stats import ttest_1samp

    sizes = [len(inputs[0]) for _, inputs in teachers]
    parts = min(*sizes, -(-max(sizes) // _PART))
    exams = [_Exam(dense, inputs, parts, likelihood) for dense, inputs in teachers]
    gains: list[float] = []
    for part in range(parts):
        gains.append(sum(one.compare(first, second, part) for one in exams))
        if len(gains) >= _FEWEST and len(gains).bit_count() == 1 and ttest_1samp(gains, 0).pvalue < _DOUBT:
            break
    return sum(one.find_mean() for one in exams)


class _Exam:
    """A dense model's inputs in parts, shuffled: they may come sorted."""

    def __init__(self, dense: nn.Module, inputs: Inputs, parts: int, likelihood: Likelihood | None) -> None:
        self._dense, self._inputs = dense, inputs
        order = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(0))
        self._places: tuple[Tensor, ...] = order.tensor_split(parts)
        self._looked_at: dict[int, Outputs] = {}  # the first parts alone: all outputs may have no place in memory
        self._sum, self._count = 0.0, 0
        likelihood = assume_logits(self._answer(0)) if likelihood is None else likelihood
        self._likelihood, self._scales = likelihood, Outputs()
        if not all(one.is_choice for one in likelihood.values()):
            self._looked_at = {part: self._answer(part) for part in range(min(_SCALED, parts))}
            self._scales = measure_scales(self._looked_at.values(), likelihood)

    def compare(self, first: nn.Module, second: nn.Module, part: int) -> float:
        """The first model's mean divergence less the second's."""
        batch, wanted = self._take(part), self._answer(part)
        own, other = (measure_divergence(one, batch, wanted, self._likelihood, self._scales) for one in (first, second))
        self._sum += (own - other) * len(batch[0])
        self._count += len(batch[0])
        return own - other

    def find_mean(self) -> float:
        """The mean over all samples so far: parts may differ by one."""
        return self._sum / self._count

    def _take(self, part: int) -> Inputs:
        return tuple(tensor[self._places[part]] for tensor in self._inputs)

    def _answer(self, part: int) -> Outputs:
        return self._looked_at[part] if part in self._looked_at else call(self._dense, self._take(part))
