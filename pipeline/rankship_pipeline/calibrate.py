"""Streamed Gram matrices G = XᵀX of every layer's inputs: what whitening and the joint merge need, and nothing more."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.utils.hooks import RemovableHandle

from rankship_pipeline.data import Inputs
from rankship_pipeline.layers import Layer, get_layer

Grams = dict[str, Tensor]
BATCH = 64


@torch.inference_mode()
def collect_grams(model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> Grams:
    """Run all samples through the model and sum each layer's uncentred Gram, float64 (columns, columns).

    Rows of X are tokens of a linear layer or im2col patches of a convolution, divided by the number of samples, so
    that models calibrated on different amounts of data weigh the same. Only one batch of activations is ever held.
    """
    grams = {layer.name: torch.zeros(layer.columns, layer.columns, dtype=torch.float64) for layer in layers}
    handles = [_watch(get_layer(model, name), gram) for name, gram in grams.items()]
    try:
        for batch in split(inputs):
            model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    samples = len(inputs[0])
    return {name: gram / samples for name, gram in grams.items()}


def split(inputs: Inputs, size: int = BATCH) -> list[Inputs]:
    """Cut samples into the fewest batches of at most `size`, as even as can be: averages over batches are then fair."""
    count = -(-len(inputs[0]) // size)
    return list(zip(*(tensor.tensor_split(count) for tensor in inputs), strict=True))


def _watch(module: nn.Linear | nn.Conv2d, gram: Tensor) -> RemovableHandle:
    def add(_module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        X = as_rows(module, args[0] if args else named["input"]).to(torch.float64)  # (positions, columns)
        gram.addmm_(X.T, X)

    return module.register_forward_pre_hook(add, with_kwargs=True)


def as_rows(module: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """A layer's input as rows: tokens (·, in), or the patches that the convolution sees (·, in·kh·kw)."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if isinstance(module.padding, str):
        left_right_top_bottom = module._reversed_padding_repeated_twice  # noqa: SLF001 - what Conv2d itself pads with
        x = nn.functional.pad(x, left_right_top_bottom)
        padding: int | tuple[int, ...] = 0
    else:
        padding = module.padding
    patches = unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # (n, in·kh·kw, positions)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
