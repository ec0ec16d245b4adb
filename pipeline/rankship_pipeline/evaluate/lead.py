"""Which of two models is nearer to the dense ones, on as few samples as tell them apart."""

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import nn

from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import split
from rankship_pipeline.evaluate.likelihood import Likelihood
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import call

# Samples of every dense model come in parts of so many. After so many parts at least, and whenever they have doubled,
# the rest is left out if chance would give either model such a lead with this probability.
_PART, _FEWEST, _DOUBT = 4, 4, 0.01


@torch.inference_mode()
def measure_lead(
    first: nn.Module,
    second: nn.Module,
    teachers: Sequence[tuple[nn.Module, Inputs]],
    likelihood: Likelihood | None = None,
) -> float:
    """By how many nats a part the first model diverges more from the dense ones than the second (Student's t test).

    Each of the `teachers` is a dense model with its inputs; their divergences add up (see measure_divergence).
    """
    from scipy.stats import ttest_1samp

    gains: list[float] = []
    for parts in zip_longest(*(split(inputs, _PART) for _, inputs in teachers)):
        gain = 0.0
        for (dense, _), part in zip(teachers, parts, strict=True):
            if part is not None:
                wanted = call(dense, part)
                own, other = (measure_divergence(one, part, wanted, likelihood) for one in (first, second))
                gain += own - other
        gains.append(gain)
        if len(gains) >= _FEWEST and len(gains).bit_count() == 1 and ttest_1samp(gains, 0).pvalue < _DOUBT:
            break
    return sum(gains) / len(gains)
