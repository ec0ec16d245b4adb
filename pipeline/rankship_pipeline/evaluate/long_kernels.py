"""The Gram of the patches under a long kernel, from products of shifted signals instead of from the patches.

Patches of one signal overlap, so nearly all products of their elements are shared: a kernel of K steps over L positions
costs K·L products of channels instead of K²·L.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankship_pipeline.models.layers import Convolution

_LONG = 16  # steps of a kernel from which its patches are not written out


def is_long(module: Convolution) -> bool:
    """Whether a convolution's kernel is long along one axis and one wide along the other, and moves step by step."""
    return (
        max(module.kernel_size) >= _LONG
        and sum(size > 1 for size in module.kernel_size) == 1
        and {*module.stride, *module.dilation} == {1}
    )


def add_patches(gram: Tensor, module: Convolution, x: Tensor, padding: tuple[int, ...]) -> None:
    """Add the Gram of the patches of x (n, in, length) or (n, in, height, width) to one of (in·K, in·K)."""
    x = pad(x, [size for one in reversed(padding) for size in (one, one)]).double()  # sums are subtracted
    axis = 2 + max(range(len(module.kernel_size)), key=lambda one: module.kernel_size[one])
    signals = x.movedim(axis, 0).movedim(2, 1).flatten(2)  # (positions, in, signals)
    steps, (positions, channels, _) = max(module.kernel_size), signals.shape
    patches = positions - steps + 1
    blocks = gram.view(channels, steps, channels, steps)
    for lag in range(steps):
        products = signals[: positions - lag] @ signals[lag:].transpose(1, 2)  # (positions − lag, in, in)
        sums = torch.cat([products.new_zeros(1, channels, channels), products]).cumsum(0)
        for step in range(steps - lag):
            block = sums[step + patches] - sums[step]
            blocks[:, step, :, step + lag] += block
            if lag:
                blocks[:, step + lag, :, step] += block.T
