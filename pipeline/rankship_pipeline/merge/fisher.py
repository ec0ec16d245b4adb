"""Fisher-weighted averaging, and the diagonal Fisher information of a model's own predictions."""

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import find_scales, split
from rankship_pipeline.evaluate.likelihood import Likelihood, draw_predictions
from rankship_pipeline.evaluate.masks import find_masks
from rankship_pipeline.merge.tensors import MergeInput, sum_in_order
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import call
from rankship_pipeline.models.weights import State

# Backward passes of each sample; with so many signs the sum over up to 16 classes is exact.
_DRAWS = 16


def merge_fisher(given: MergeInput) -> Tensor:
    """Σ_t F_t θ_t / Σ_t F_t, element by element (Matena and Raffel 2022, all models with the same weight).

    Biases and norms alike; buffers, and elements that no model's predictions depend on, are averaged.
    """
    average = given.average()
    if not given.fishers:
        return average
    total = sum_in_order(given.fishers)
    pull = sum_in_order([fisher * (value - average) for fisher, value in zip(given.fishers, given.values, strict=True)])
    return average + (pull / torch.where(total > 0, total, 1)).to(average.dtype)


def measure_fisher(
    model: nn.Module, inputs: Inputs, samples: int, seed: int = 0, likelihood: Likelihood | None = None
) -> State:
    """The diagonal Fisher information E_x E_{y~p(y|x)} (∂ log p(y|x) / ∂θ)², float64, by parameter name.

    It needs no labels, only the model's own predictions, distributed by the `likelihood` (None: logits). Uses at most
    `samples` inputs, spread evenly, each with its own backward pass, because squares of gradients do not add up over a
    batch. A tied weight is listed under its first name.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    parameters = [model.get_parameter(name) for name in names]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    fishers = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in zip(names, parameters, strict=True)}
    count = len(inputs[0])
    chosen = torch.linspace(0, count - 1, min(samples, count)).round().long()
    likelihood, scales = find_scales(model, inputs, likelihood)
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        with torch.enable_grad():
            for sample in split(tuple(tensor[chosen] for tensor in inputs), 1):
                masks = find_masks(model, sample)
                for target in draw_predictions(call(model, sample), likelihood, scales, masks, generator, _DRAWS):
                    found = torch.autograd.grad(target, parameters, retain_graph=True, allow_unused=True)
                    for name, gradient in zip(names, found, strict=True):
                        if gradient is not None:
                            fishers[name] += gradient.to(torch.float64).square()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's own name for it is positional
    return {name: fisher / len(chosen) for name, fisher in fishers.items()}
