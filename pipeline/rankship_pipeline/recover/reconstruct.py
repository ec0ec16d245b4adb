"""Asymmetric reconstruction: refits each layer to the inputs that the compressed layers before it produce."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import split
from rankship_pipeline.evaluate.masks import find_masks, pick_mask
from rankship_pipeline.evaluate.rows import as_rows
from rankship_pipeline.factors.analysis import Analysis
from rankship_pipeline.factors.decompose import Metric, make_metric
from rankship_pipeline.factors.forms import compose, make_weights
from rankship_pipeline.factors.rebuild import fill_factors, rebuild
from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer, get_layer, shape_weight
from rankship_pipeline.models.watch import run_until, watch

# Added to the Gram's diagonal as a share of itself: directions with little data keep the dense weight.
RIDGE = 1e-3


def reconstruct(
    analysis: Analysis, plan: Mapping[str, Factors], inputs: Inputs, tick: Callable[[], None] = lambda: None
) -> nn.Module:
    """Fill the plan's factors layer by layer, in the order in which layers run, without labels or training.

    With X the dense model's inputs to a layer and X̂ those that the compressed layers before it produce, the target is
    M = argmin ‖W·Xᵀ − M·X̂ᵀ‖² = W·(XᵀX̂)·(X̂ᵀX̂)⁻¹, and M's best factors under X̂'s Gram are kept (reduced-rank
    regression; asymmetric reconstruction of Zhang et al. 2016, arXiv 1505.06798 §3.3). A bias takes up the remaining
    difference of the means. Layers that stay dense are not changed, and those that run several times, as a recurrent
    network's do, are factored without a correction: what one call sees says little of the others. Nor are layers
    corrected that are too wide for a Gram of their inputs.
    """
    student = copy.deepcopy(analysis.model)
    weights: dict[str, tuple[Tensor, ...]] = {}
    for layer, calls in _order(analysis, inputs):
        if layer.name in plan:
            corrected = calls == 1 and not layer.is_widest
            with profile.layer(layer.name):
                weights[layer.name] = _refit(analysis, student, layer, plan[layer.name], inputs if corrected else None)
            tick()
    for name in plan.keys() - weights.keys():  # a layer that never ran
        weights[name] = make_weights(analysis.layers[name], plan[name])
    compressed = rebuild(student, plan)  # with the corrected biases
    for name, factors in weights.items():
        fill_factors(compressed.get_submodule(name), factors)
    return compressed


def _refit(
    analysis: Analysis, student: nn.Module, layer: Layer, factors: Factors, inputs: Inputs | None
) -> tuple[Tensor, ...]:
    """A layer's weights, corrected by its `inputs` in both models; uncorrected without."""
    taken = analysis.layers[layer.name]
    module = get_layer(student, layer.name)
    if layer.kind == "embedding" or inputs is None:  # nothing runs before an embedding
        weights = make_weights(taken, factors)
    else:
        crossed = _run_both(analysis.model, student, layer, inputs)
        seen = make_metric(crossed.grams, None, len(inputs[0]), shrunk=taken.metric.evidence is not None)
        taken = taken.open_inputs()
        target = taken.weight + crossed.correct(taken.weight, seen)
        metric = replace(taken.metric, gram=seen.gram if taken.metric.gram is not None else None)
        weights = make_weights(replace(taken, weight=target, metric=metric), factors)
    matrix = compose(layer, factors, weights)
    with torch.no_grad():
        module.weight.copy_(shape_weight(matrix, module.weight, layer))
        bias = getattr(module, "bias", None)
        if bias is not None and inputs is not None and layer.kind in {"linear", "convolution"}:
            bias += (taken.restore(taken.weight) @ crossed.mean - matrix @ crossed.changed_mean).to(bias.dtype)
    return weights


class _Crossed:
    """Sums over positions of the inputs to one layer in the dense (x) and in the compressed model (x̂), float64."""

    def __init__(self, layer: Layer) -> None:
        n = layer.columns
        self.grams = torch.zeros(2, n, n, dtype=torch.float64)  # X̂ᵀX̂ of the even and of the odd samples
        self.cross = torch.zeros(n, n, dtype=torch.float64)  # XᵀX̂
        self.sum = torch.zeros(n, dtype=torch.float64)
        self.changed_sum = torch.zeros(n, dtype=torch.float64)
        self.positions = 0

    def add(self, X: Tensor, changed: Tensor, half: int) -> None:
        X, changed = X.to(torch.float64), changed.to(torch.float64)
        self.grams[half].addmm_(changed.T, changed)
        self.cross.addmm_(X.T, changed)
        self.sum += X.sum(0)
        self.changed_sum += changed.sum(0)
        self.positions += len(X)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.positions

    @property
    def changed_mean(self) -> Tensor:
        return self.changed_sum / self.positions

    def correct(self, weight: Tensor, seen: Metric) -> Tensor:
        """M − W = (1 − λ)·W·(XᵀX̂ − X̂ᵀX̂)·(Ĝ + ridge)⁻¹, (rows, columns), with the shrunk Gram Ĝ of X̂ and its λ.

        Where the samples say nothing, XᵀX̂ is taken for the shrunk Gram, so that no correction is left at λ = 1.
        """
        assert seen.gram is not None  # noqa: S101 - made from self.grams
        kept = 1.0 if seen.evidence is None else 1 - seen.evidence.intensity
        damped = 2 * seen.gram + (2 * RIDGE * seen.gram.diagonal() + 1e-30).diag()  # of all samples, as the sums are
        pull = kept * weight @ (self.cross - self.grams.sum(0))
        correction: Tensor = torch.linalg.solve(damped, pull, left=False)
        return correction


@torch.inference_mode()
def _run_both(dense: nn.Module, student: nn.Module, layer: Layer, inputs: Inputs) -> _Crossed:
    crossed = _Crossed(layer)
    halves = [(half, tuple(tensor[half::2] for tensor in inputs)) for half in range(min(2, len(inputs[0])))]
    for half, batch in ((half, batch) for half, some in halves for batch in split(some)):
        masks = find_masks(dense, batch)
        seen = [run_until(model, layer.name, batch)[0] for model in (dense, student)]
        X, changed = (
            as_rows(get_layer(model, layer.name), x, pick_mask(masks, x.shape))
            for model, x in zip((dense, student), seen, strict=True)
        )
        crossed.add(X, changed, half)
    return crossed


@torch.inference_mode()
def _order(analysis: Analysis, inputs: Inputs) -> list[tuple[Layer, int]]:
    """The layers in the order in which one sample runs through them, each with its number of calls."""
    order: dict[str, int] = {}
    owners = {use.name: name for name, taken in analysis.layers.items() for use in taken.layer.uses}

    def see(name: str, _x: Tensor, _y: Tensor) -> None:
        order[owners[name]] = order.get(owners[name], 0) + 1

    with watch(analysis.model, owners, see):
        analysis.model(*(tensor[:1] for tensor in inputs))
    return [(analysis.layers[name].layer, calls) for name, calls in order.items()]
