"""Merges layer by layer: each is fitted to the specialists' outputs, on the inputs from the merged layers before it.

A merge that treats each layer alone assumes every model's own inputs. The merged network has other inputs: errors add
up from layer to layer, and batch-norm statistics of the models no longer fit. Here the layers are solved in running
order, on the inputs that they have in the merged network.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankship_pipeline.evaluate.calibrate import split
from rankship_pipeline.evaluate.masks import find_masks, pick_mask
from rankship_pipeline.evaluate.rows import as_outputs, as_rows
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import compose, make_weights
from rankship_pipeline.factors.rebuild import fill_factors, rebuild
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer, as_matrix, get_layer, shape_weight
from rankship_pipeline.models.watch import run_until, watch
from rankship_pipeline.recover.reconstruct import RIDGE

Teachers = Sequence[tuple[nn.Module, Inputs]]


def refit(
    model: nn.Module,
    layers: Sequence[Layer],
    teachers: Teachers,
    plan: Mapping[str, Factors] = MappingProxyType({}),
    taken: Mapping[str, Decomposition] = MappingProxyType({}),
) -> nn.Module:
    """A copy of a merged model with every layer solved again, in running order, without labels or training.

    With X̂_t a layer's inputs in the merged model on task t's data and Z_t its outputs in task t's own model, M and b
    minimise Σ_t ‖Z_t − X̂_t·Mᵀ − b‖²: (Σ_t Z_tᵀX̂_t)(Σ_t X̂_tᵀX̂_t)⁻¹ about the means. It is the joint closed form
    with inputs and outputs measured in the models that produce them. Layers of the `plan`, decomposed in
    `taken`, get M's best factors under the same Gram, so that merging and compressing are one step. Directions with
    little data keep the merged weight.

    If a batch-norm takes the layer's output, Z_t is measured after it: every task is normalised by its own statistics,
    and the merged norm is set to pass M's outputs on. Layers without a bias or such a norm have no b. Embeddings,
    transposed convolutions, heads and layers that never run are not changed.
    """
    student = copy.deepcopy(model).eval()
    norms = find_norms(student, layers, tuple(tensor[:1] for tensor in teachers[0][1]))
    by_name = {layer.name: layer for layer in layers if layer.kind in {"linear", "convolution"}}
    weights: dict[str, tuple[Tensor, ...]] = {}
    for name, norm in norms.items():
        if name not in by_name:
            continue
        layer = by_name[name]
        sums = _gather(student, layer, norm, teachers)
        target = sums.solve(_as_followed(student, layer, norm))
        if name in plan:
            before = taken[name]
            # the first call of a recurrent network's state sees zeros alone
            gram = sums.gram if bool(sums.gram.any()) else before.metric.gram
            metric = replace(before.metric, gram=gram)
            weights[name] = make_weights(Decomposition(layer, target, metric, before.whitening), plan[name])
            target = compose(layer, plan[name], weights[name])
        _write(student, layer, norm, target, sums)
    for name in plan.keys() - weights.keys():
        weights[name] = make_weights(taken[name], plan[name])
    compressed = rebuild(student, plan)
    for name, factors in weights.items():
        fill_factors(compressed.get_submodule(name), factors)
    return compressed


@torch.inference_mode()
def find_norms(model: nn.Module, layers: Sequence[Layer], sample: Inputs) -> dict[str, str | None]:
    """The layers that run on a sample, in running order, each with the batch-norm that takes its output, or None."""
    found: dict[str, str | None] = {}
    outputs: dict[int, str] = {}
    alive: list[Tensor] = []  # a freed output's address could be reused

    def see_layer(name: str, _x: Tensor, y: Tensor) -> None:
        found.setdefault(name, None)
        outputs[id(y)] = name
        alive.append(y)

    def see_norm(name: str, x: Tensor, _y: Tensor) -> None:
        if id(x) in outputs:
            found[outputs[id(x)]] = name

    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine and module.track_running_stats
    ]
    with watch(model, [layer.name for layer in layers], see_layer), watch(model, norms, see_norm):
        model(*sample)
    return found


class _Sums:
    """Sums over positions of a layer's inputs x̂ and its wanted outputs z, float64."""

    def __init__(self, layer: Layer, *, centred: bool) -> None:
        self.gram = torch.zeros(layer.columns, layer.columns, dtype=torch.float64)  # X̂ᵀX̂
        self.cross = torch.zeros(layer.rows, layer.columns, dtype=torch.float64)  # ZᵀX̂
        self.inputs = torch.zeros(layer.columns, dtype=torch.float64)
        self.wanted = torch.zeros(layer.rows, dtype=torch.float64)
        self.positions = 0.0
        self.centred = centred

    def add(self, X: Tensor, Z: Tensor, weight: float) -> None:
        X, Z = X.to(torch.float64), Z.to(torch.float64)
        self.gram.addmm_(X.T, X, alpha=weight)
        self.cross.addmm_(Z.T, X, alpha=weight)
        self.inputs += weight * X.sum(0)
        self.wanted += weight * Z.sum(0)
        self.positions += weight * len(X)

    def solve(self, merged: Tensor) -> Tensor:
        """M (rows, columns), pulled towards the `merged` weight by the ridge."""
        gram, cross = self.gram, self.cross
        if self.centred:
            gram = gram - torch.outer(self.inputs, self.inputs) / self.positions
            cross = cross - torch.outer(self.wanted, self.inputs) / self.positions
        damping = RIDGE * self.gram.diagonal() + 1e-30
        damped = gram + damping.diag()
        solved: Tensor = torch.linalg.solve(damped, cross + damping * merged, left=False)
        return solved

    def find_bias(self, matrix: Tensor) -> Tensor:
        """The remaining difference of the means, (rows,)."""
        return (self.wanted - matrix @ self.inputs) / self.positions

    def describe_outputs(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of M·x̂ over positions, each (rows,)."""
        mean = matrix @ self.inputs / self.positions
        square = ((matrix @ self.gram) * matrix).sum(1) / self.positions
        return mean, (square - mean * mean).clamp_min(0)


def _gather(student: nn.Module, layer: Layer, norm: str | None, teachers: Teachers) -> _Sums:
    biased = getattr(get_layer(student, layer.name), "bias", None) is not None
    sums = _Sums(layer, centred=norm is not None or biased)
    for teacher, inputs in teachers:
        for batch in split(inputs):
            x, _ = run_until(student, layer.name, batch)
            _, z = run_until(teacher, norm or layer.name, batch)
            X = as_rows(get_layer(student, layer.name), x, pick_mask(find_masks(student, batch), x.shape))
            Z = as_outputs(get_layer(teacher, layer.name), z, pick_mask(find_masks(teacher, batch), z.shape))
            sums.add(X, Z, 1 / len(inputs[0]))
    return sums


def _as_followed(student: nn.Module, layer: Layer, norm: str | None) -> Tensor:
    """The merged weight as a matrix, its rows scaled by the norm after it."""
    matrix = as_matrix(get_layer(student, layer.name))
    if norm is None:
        return matrix
    behind = student.get_submodule(norm)
    assert isinstance(behind, _BatchNorm)  # noqa: S101 - find_norms looked
    scale = behind.weight / (_fixed(behind.running_var) + behind.eps).sqrt()
    return matrix * scale.detach().to(torch.float64)[:, None]


@torch.no_grad()
def _write(student: nn.Module, layer: Layer, norm: str | None, matrix: Tensor, sums: _Sums) -> None:
    """Set the weight, and the bias or the norm after it, so that their output is M·x̂ + b.

    The norm gets the outputs' own statistics, so that re-estimating them or training on changes little at first.
    """
    module = get_layer(student, layer.name)
    module.weight.copy_(shape_weight(matrix, module.weight, layer))
    bias = sums.find_bias(matrix)
    if norm is None:
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(bias)  # type: ignore[union-attr,operator]  # it is there
        return
    behind = student.get_submodule(norm)
    assert isinstance(behind, _BatchNorm)  # noqa: S101 - find_norms looked
    mean, variance = sums.describe_outputs(matrix)
    own = getattr(module, "bias", None)
    shift = 0 if own is None else own.to(torch.float64)
    behind.weight.copy_((variance + behind.eps).sqrt())
    behind.bias.copy_(bias + mean)
    _fixed(behind.running_mean).copy_(mean + shift)
    _fixed(behind.running_var).copy_(variance)


def _fixed(statistic: Tensor | None) -> Tensor:
    assert statistic is not None  # noqa: S101 - find_norms took norms that track them
    return statistic
