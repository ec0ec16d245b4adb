"""Measures what a layer's factors lose on samples that they were not made from."""

from dataclasses import replace

from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import approximate
from rankship_pipeline.foundation.records import Factors


def measure_held_out(taken: Decomposition, factors: Factors) -> float | None:
    """The share of the output energy lost on unseen samples, by cross-fitting; None without two halves of samples.

    Factors are made from one half of the samples and measured on the other, both ways. Half the samples make slightly
    worse factors than all of them, so the figure errs on the high side.
    """
    evidence = taken.metric.evidence
    if evidence is None or not all(bool(half.any()) for half in evidence.halves):
        return None
    lost = whole = 0.0
    for made, unseen in ((0, 1), (1, 0)):
        metric = Metric(gram=evidence.shrink_half(made), curvature=taken.metric.curvature)
        change = taken.weight - approximate(replace(taken, metric=metric), factors)
        gram = evidence.halves[unseen].double()
        lost += taken.measure(change, gram)
        whole += taken.measure(taken.weight, gram)
    return lost / whole if whole else 0.0
