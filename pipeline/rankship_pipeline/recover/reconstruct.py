"""Asymmetric reconstruction: refits each layer to the inputs that the compressed layers before it produce."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.analysis import Analysis
from rankship_pipeline.factors.decompose import Metric, make_metric
from rankship_pipeline.factors.forms import compose, make_weights
from rankship_pipeline.factors.rebuild import fill_factors, rebuild
from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer, get_layer, shape_weight
from rankship_pipeline.models.watch import watch
from rankship_pipeline.recover.side_by_side import Lack, SideBySide, find_sums

# Added to the Gram's diagonal as a share of itself: directions with little data keep the dense weight.
RIDGE = 1e-3


def reconstruct(analysis: Analysis, plan: Mapping[str, Factors], inputs: Inputs) -> nn.Module:
    """Fill the plan's factors layer by layer, in the order in which layers run, without labels or training.

    With X the dense model's inputs to a layer and X̂ those that the compressed layers before it produce, the target is
    M = argmin ‖W·Xᵀ − M·X̂ᵀ‖² = W·(XᵀX̂)·(X̂ᵀX̂)⁻¹, and M's best factors under X̂'s Gram are kept (reduced-rank
    regression; asymmetric reconstruction of Zhang et al. 2016, arXiv 1505.06798 §3.3). Where a linear layer's outputs
    are added to what is carried past it, as in every transformer, the target is the dense model's sum less what is
    carried: the layer makes up for that too, also if it stays dense. A bias takes up the remaining
    difference of the means. Other layers that stay dense are not changed, and those that run several times, as a
    recurrent network's do, are factored without a correction: what one call sees says little of the others. Nor are
    layers corrected that are too wide for a Gram of their inputs.
    """
    student = copy.deepcopy(analysis.model)
    sample = tuple(one[:1] for one in inputs)
    order = _order(analysis, inputs)
    sums = find_sums(analysis.model, [layer.name for layer, _ in order if layer.kind == "linear"], sample)
    looked = [
        layer
        for layer, calls in order
        if calls == 1
        and not layer.is_widest
        and layer.kind != "embedding"
        and (layer.name in plan or layer.name in sums)
    ]  # nothing runs before an embedding
    pair = SideBySide(analysis.model, student, [layer.name for layer in looked], inputs)
    weights: dict[str, tuple[Tensor, ...]] = {}
    for layer, _ in order:
        if layer.name not in plan and not (weights and layer in looked):
            continue
        with profile.layer(layer.name):
            refit = _Refit(analysis, student, layer, len(inputs[0]), sums)
            lack = pair.look(layer, refit.weight, refit.sum_at) if layer in looked else None
            if layer.name in plan:
                weights[layer.name] = refit.factor(plan[layer.name], lack)
            elif lack is not None:
                refit.correct(lack)
    for name in plan.keys() - weights.keys():  # a layer that never ran
        weights[name] = make_weights(analysis.layers[name], plan[name])
    compressed = rebuild(student, plan)  # with the corrected biases
    for name, factors in weights.items():
        fill_factors(compressed.get_submodule(name), factors)
    return compressed


class _Refit:
    """One layer of the student, to be corrected by what its outputs lack."""

    def __init__(
        self, analysis: Analysis, student: nn.Module, layer: Layer, samples: int, sums: Mapping[str, str]
    ) -> None:
        self._known = analysis.layers[layer.name]
        self._taken = self._known.open_inputs()
        self._layer, self._samples = layer, samples
        # The module that reads the layer's outputs in a sum; None too if they are known by a shorter side alone.
        self.sum_at = None if self._taken.outer is not None else sums.get(layer.name)
        self._module = get_layer(student, layer.name)

    @property
    def weight(self) -> Tensor:
        """The dense weight, of the side that factors are made for."""
        return self._taken.weight

    def factor(self, factors: Factors, lack: Lack | None) -> tuple[Tensor, ...]:
        """The operators' weights; uncorrected without a `lack`. What they compute is the student's weight from now."""
        if lack is None:
            weights = make_weights(self._known, factors)
        else:
            seen = self._see(lack)
            target = self.weight + self._find_correction(lack, seen)
            metric = replace(self._taken.metric, gram=seen.gram if self._taken.metric.gram is not None else None)
            weights = make_weights(replace(self._taken, weight=target, metric=metric), factors)
        self._write(compose(self._layer, factors, weights), lack)
        return weights

    def correct(self, lack: Lack) -> None:
        """Correct a weight that stays dense."""
        self._write(self.weight + self._find_correction(lack, self._see(lack)), lack)

    def _find_correction(self, lack: Lack, seen: Metric) -> Tensor:
        """M − W = (1 − λ)·DᵀX̂·(Ĝ + ridge)⁻¹, (rows, columns), with the shrunk Gram Ĝ of X̂ and its λ.

        Where the samples say nothing, the outputs are taken to lack nothing, so that no correction is left at λ = 1.
        What is carried past the layer may depend on its inputs by chance alone: there 1 − λ is what halves of the
        samples bear out of each other's corrections.
        """
        assert seen.gram is not None  # noqa: S101 - made from lack.grams
        if seen.evidence is None:
            kept = 1.0
        else:
            kept = 1 - seen.evidence.intensity if self.sum_at is None else _find_trust(lack)
        return _fit(kept * lack.cross.sum(0), 2 * seen.gram)  # of all samples, as the sums are

    def _see(self, lack: Lack) -> Metric:
        return make_metric(lack.grams, None, self._samples, shrunk=self._known.metric.evidence is not None)

    @torch.no_grad()
    def _write(self, matrix: Tensor, lack: Lack | None) -> None:
        weight = self._module.weight
        weight.copy_(shape_weight(matrix, weight, self._layer))
        bias = getattr(self._module, "bias", None)
        if bias is not None and lack is not None and self._layer.kind in {"linear", "convolution"}:
            wanted = self._taken.restore_outputs(lack.lacked[:, None])[:, 0]
            changed = (self._taken.restore(self.weight) - matrix) @ lack.read
            bias += ((wanted + changed) / lack.positions).to(bias.dtype)


def _fit(cross: Tensor, gram: Tensor) -> Tensor:
    """DᵀX̂·(X̂ᵀX̂ + ridge)⁻¹, (rows, columns)."""
    damped = gram + (RIDGE * gram.diagonal() + 1e-30).diag()
    fitted: Tensor = torch.linalg.solve(damped, cross, left=False)
    return fitted


def _find_trust(lack: Lack) -> float:
    """The share, 0 to 1, of a correction by all samples that others would bear out.

    One fitted to a half of the samples is too large for the other half by what its noise adds: the share that suits the
    other half best is α = s / (s + v), of signal and noise, and for all samples, with half the noise, 2α / (1 + α).
    """
    gain = cost = 0.0
    for made, unseen in ((0, 1), (1, 0)):
        C = _fit(lack.cross[made], lack.grams[made])
        gain += float((C * lack.cross[unseen]).sum())
        cost += float(((C @ lack.grams[unseen]) * C).sum())
    share = min(1.0, max(0.0, gain / cost)) if cost > 0 else 0.0
    return 2 * share / (1 + share)


@torch.inference_mode()
def _order(analysis: Analysis, inputs: Inputs) -> list[tuple[Layer, int]]:
    """The layers in the order in which one sample runs through them, each with its number of calls."""
    order: dict[str, int] = {}
    owners = {use.name: name for name, layer in analysis.layers.described.items() for use in layer.uses}

    def see(name: str, _x: Tensor, _y: Tensor) -> None:
        order[owners[name]] = order.get(owners[name], 0) + 1

    with watch(analysis.model, owners, see):
        analysis.model(*(tensor[:1] for tensor in inputs))
    return [(analysis.layers.described[name], calls) for name, calls in order.items()]
