"""Estimates the curvature of a model's predictions at every layer's output, from one backward pass a batch."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import (
    Grams,
    find_dtype,
    find_scales,
    fit_batch,
    join_embeddings,
    share_rows,
    split,
)
from rankship_pipeline.evaluate.likelihood import Likelihood, draw_predictions
from rankship_pipeline.evaluate.masks import Masks, find_masks, pick_mask
from rankship_pipeline.evaluate.rows import as_rows, count_rows, sample_outputs, sample_rows
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer, get_layer
from rankship_pipeline.models.outputs import Outputs, call
from rankship_pipeline.models.watch import fork_inputs, watch

# Samples that tell enough: a ResNet-20 at 40 % lost as much with 256 as with 1,000, and a point more with 128.
SAMPLES = 256
_BATCH = 32
_BYTES = 2**29  # that a backward pass keeps of one batch


def collect_curvatures(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[Layer],
    seed: int = 0,
    likelihood: Likelihood | None = None,
    draws: int = 1,
    scales: Outputs | None = None,
) -> Grams:
    """The Fisher information H of the model's own predictions at every layer's output, (rows, rows).

    E_x E_{y~p(y|x)} Σ g·gᵀ / positions with g = ∂ log p(y|x) / ∂ output: it needs no labels, only the model's own
    predictions, distributed by the `likelihood` (None: every output holds logits), with the standard deviations
    `scales` (None: of these inputs) of outputs that are no classes' scores. With a Gram G from
    `collect_grams`, ½·tr(H·Δ·G·Δᵀ) is the Kronecker-factored estimate of the divergence in nats that an error Δ in
    the weight causes (Martens and Grosse 2015). Of layers tied to each other it is that of the embeddings, of a layer
    that `is_tall` that at its inputs, Wᵀ·H·W (columns, columns).

    Each of the `draws` is one backward pass with random signs over classes (see `draw_predictions`); more samples tell
    more than more draws. Gradients are used and dropped as they come; weights have none. Many rows are summed in
    float32 (see `find_dtype`).
    Batches are as large as _BYTES allow. Of a layer with many more positions than rows some are drawn (see
    `share_rows`).
    """
    curvatures = {layer.name: _start_curvature(layer) for layer in layers}
    kept_under = {use: name for use, name in join_embeddings(layers).items() if name in curvatures}
    modules = {name: get_layer(model, name) for name in kept_under}
    tall = {layer.name for layer in layers if layer.is_tall}
    generator = torch.Generator().manual_seed(seed)
    positions, turns, samples = Counter[str](), Counter[str](), len(inputs[0])
    if likelihood is None or scales is None:
        likelihood, scales = find_scales(model, inputs, likelihood)
    batch, masks = inputs, Masks()  # those that are running

    def add(name: str, gradient: Tensor) -> None:
        module, mask, curvature = modules[name], pick_mask(masks, gradient.shape), curvatures[kept_under[name]]
        turns[name] += 1
        find_share = partial(share_rows, len(curvature), batch=len(batch[0]), samples=samples)
        if name in tall:
            g = as_rows(module, gradient, mask)
            g, weight = sample_rows(g, find_share(len(g)), turns[name])
        else:
            g, weight = sample_outputs(module, gradient, mask, find_share, turns[name])  # (positions, rows)
        if curvature.dtype == torch.float32:
            g = g.float()
            curvature.addmm_(g.T, g, alpha=weight)
        else:
            curvature.add_(g.T @ g, alpha=weight)

    def keep(name: str, x: Tensor, y: Tensor) -> Tensor:
        positions[kept_under[name]] += count_rows(modules[name], x, y, pick_mask(masks, y.shape))
        hooked = x if name in tall else y if y.requires_grad else y.requires_grad_()
        hooked.register_hook(lambda gradient: add(name, gradient))  # type: ignore[no-untyped-call]  # torch types no hook
        return y.clone() if y.is_leaf else y  # torch refuses an activation in place of a leaf

    def draw(some: Inputs, generator: torch.Generator, draws: int) -> Iterator[Tensor]:
        return draw_predictions(call(model, some), likelihood, scales, masks, generator, draws)

    with _freeze(model), torch.enable_grad(), fork_inputs(model, tall), watch(model, modules, keep):
        batch = tuple(tensor[:1] for tensor in inputs)
        masks = find_masks(model, batch)
        needed = _measure_kept(model, lambda: list(draw(batch, torch.Generator(), 1)))
        positions.clear()
        for batch in split(inputs, fit_batch(needed, _BYTES, _BATCH)):
            masks = find_masks(model, batch)
            for drawn, scalar in enumerate(draw(batch, generator, draws), start=1):
                scalar.backward(retain_graph=drawn < draws)  # type: ignore[no-untyped-call]  # torch types no backward
    return {name: curvature / max(1, positions[name]) for name, curvature in curvatures.items()}


def _start_curvature(layer: Layer) -> Tensor:
    size = layer.columns if layer.is_tall else layer.rows
    return torch.zeros(size, size, dtype=find_dtype(size))


@contextmanager
def _freeze(model: nn.Module) -> Iterator[None]:
    """Give no parameter a gradient: a backward pass then keeps no layer's inputs."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's own name for it is positional
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _measure_kept(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of all tensors that a backward pass after `run` would need, without the model's own."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    own = {one.data_ptr() for one in (*model.parameters(), *model.buffers())}
    return sum(size for place, size in kept.items() if place not in own)
