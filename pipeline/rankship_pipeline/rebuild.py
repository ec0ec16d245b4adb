"""A model whose planned layers are two operators each."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankship_pipeline.errors import BuildError
from rankship_pipeline.factorise import Spectrum, truncate
from rankship_pipeline.layers import get_layer


def rebuild(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """A copy in which every layer of `ranks` is Sequential(first, second) of that rank, weights unset.

    A linear layer becomes in→k→out; a convolution becomes k filters of the same kernel, stride and padding, then a
    1×1 convolution (channel SVD, METHODS §5). The bias belongs to the second. The same call restores the structure
    for a saved state dict.
    """
    factored = copy.deepcopy(model)
    for name, rank in ranks.items():
        _replace(factored, name, _split(get_layer(factored, name), rank))
    return factored.eval()


def fill_factors(model: nn.Module, ranks: Mapping[str, int], spectra: Mapping[str, Spectrum]) -> None:
    """Write the truncated factors of every layer of `ranks` into a rebuilt model."""
    for name, rank in ranks.items():
        first, second = model.get_submodule(name).children()
        A, B = truncate(spectra[name], rank)
        _assign(first, B)
        _assign(second, A)


def _split(module: nn.Linear | nn.Conv2d, rank: int) -> nn.Sequential:
    has_bias = module.bias is not None
    if isinstance(module, nn.Linear):
        pair = nn.Sequential(
            nn.Linear(module.in_features, rank, bias=False), nn.Linear(rank, module.out_features, bias=has_bias)
        )
    else:
        first = nn.Conv2d(
            module.in_channels,
            rank,
            module.kernel_size,  # type: ignore[arg-type]  # torch stores the pair as tuple[int, ...]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            bias=False,
        )
        pair = nn.Sequential(first, nn.Conv2d(rank, module.out_channels, 1, bias=has_bias))
    if module.bias is not None:
        pair[1].bias = nn.Parameter(module.bias.detach().clone())
    return pair


def _replace(model: nn.Module, name: str, replacement: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, replacement)


@torch.no_grad()
def _assign(module: nn.Module, matrix: Tensor) -> None:
    if not isinstance(module.weight, Tensor) or module.weight.numel() != matrix.numel():
        raise BuildError(f"a factor of shape {tuple(matrix.shape)} does not fit {module}")
    module.weight.copy_(matrix.reshape(module.weight.shape))
