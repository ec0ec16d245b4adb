"""Turns a layer's input and output into the rows of matrices: tokens, or the patches under a convolution's kernel."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rankship_pipeline.models.layers import Convolution, Factorable, Transposed


def as_rows(module: Factorable, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A layer's input as rows: tokens (·, in), a convolution's patches (·, in·kh·kw), or token ids (·,).

    With a mask (samples, positions), rows of padding are left out if the input has these positions.
    """
    if isinstance(module, nn.Embedding):
        return (x if mask is None or x.shape != mask.shape else x[mask]).reshape(-1)
    if isinstance(module, Convolution):
        return _unfold(module, *pad_input(module, x))
    if isinstance(module, Transposed):
        return x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])
    return _select(x, mask).reshape(-1, x.shape[-1])


def as_outputs(module: Factorable, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """A layer's output (or its gradient) as rows (positions, rows), in the order of `as_rows`.

    Of a transposed convolution it is what each input position adds to: patches of the output (·, out·kh·kw).
    """
    if isinstance(module, Convolution):
        return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])
    if isinstance(module, Transposed):
        return _unfold(module, y, [int(one) for one in module.padding])
    return _select(y, mask).reshape(-1, y.shape[-1])


def pad_input(module: Convolution, x: Tensor) -> tuple[Tensor, Sequence[int]]:
    """The input, padded as `unfold` cannot ("same", or not by zeros), and the padding that is left to it."""
    if not isinstance(module.padding, str) and module.padding_mode == "zeros":
        return x, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode)  # noqa: SLF001 - as its own forward
    return padded, [0] * len(module.kernel_size)


def sample_patches(module: Convolution, x: Tensor, places: Tensor) -> Tensor:
    """The patches (n·places, in·kh·kw) at each sample's own places (n, places) of the output, numbered row by row."""
    x, padding = pad_input(module, x)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if len(kernel) == 1:  # a height of one
        x, kernel, dilation = x.unsqueeze(-2), (1, *kernel), (1, *dilation)
        padding, stride = (0, *padding), (1, *stride)
    x = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    width = _count_places(x.shape[3], kernel[1], dilation[1], stride[1])
    down = (places // width * stride[0])[..., None] + torch.arange(kernel[0]) * dilation[0]  # (n, places, kh)
    along = (places % width * stride[1])[..., None] + torch.arange(kernel[1]) * dilation[1]  # (n, places, kw)
    samples = torch.arange(len(x))[:, None, None, None]
    patches = x[samples, :, down[..., None], along[..., None, :]]  # (n, places, kh, kw, in)
    return patches.movedim(-1, 2).reshape(places.numel(), -1)


def sample_places(total: int, share: float, turn: int, samples: int = 1) -> Tensor:
    """Some of `total` places for each sample, (samples, places), in an order fixed by their number.

    Each sample, the first the `turn`-th, goes on where the last one ended.
    """
    count = min(total, math.ceil(share * total))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(total))
    return order[(torch.arange(turn * count, (turn + samples) * count)) % total].view(samples, count)


def sample_rows(rows: Tensor, share: float, turn: int) -> tuple[Tensor, float]:
    """A share of the rows, and how many of them all each stands for."""
    if share >= 1 or not len(rows):
        return rows, 1.0
    places = sample_places(len(rows), share, turn)[0]
    return rows[places], len(rows) / len(places)


def sample_outputs(
    module: Factorable, y: Tensor, mask: Tensor | None, find_share: Callable[[int], float], turn: int
) -> tuple[Tensor, float]:
    """A share, by their number, of the rows of `as_outputs`, and how many of them all each stands for.

    Of a convolution's output, which is stored channel by channel, the other rows are not made.
    """
    if not isinstance(module, Convolution):
        rows = as_outputs(module, y, mask)
        return sample_rows(rows, find_share(len(rows)), turn)
    maps = y.flatten(2)
    total = len(maps) * maps.shape[2]
    share = find_share(total)
    if share >= 1:
        return as_outputs(module, y), 1.0
    places = sample_places(total, share, turn)[0]
    return maps[places // maps.shape[2], :, places % maps.shape[2]], total / len(places)


def count_rows(module: Factorable, x: Tensor, y: Tensor, mask: Tensor | None) -> int:
    """How many rows `as_rows` makes of an input x, with the module's output y."""
    if isinstance(module, Convolution | Transposed):
        maps = y if isinstance(module, Convolution) else x
        return maps.numel() // maps.shape[1]
    rows = x.numel() if isinstance(module, nn.Embedding) else x.numel() // x.shape[-1]
    return rows if mask is None or mask.numel() != rows else int(mask.sum())


def _count_places(size: int, kernel: int, dilation: int, stride: int) -> int:
    """How often a kernel fits along one padded axis."""
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def _unfold(module: Convolution | Transposed, x: Tensor, padding: Sequence[int]) -> Tensor:
    """The patches (n·positions, in·kh·kw) of the positions on which a kernel runs over x, copied once from a view."""
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if len(kernel) == 1:  # a height of one
        x, kernel, dilation = x.unsqueeze(-2), (1, *kernel), (1, *dilation)
        padding, stride = (0, *padding), (1, *stride)
    if any(padding):
        x = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height, width = (_count_places(x.shape[2 + at], kernel[at], dilation[at], stride[at]) for at in (0, 1))
    sample, channel, down, along = x.stride()
    patches = x.as_strided(
        (len(x), height, width, x.shape[1], *kernel),
        (sample, down * stride[0], along * stride[1], channel, down * dilation[0], along * dilation[1]),
    )
    return patches.reshape(len(x) * height * width, -1)


def _select(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of (samples, positions, features) that are not padding; tensors of another shape stay whole."""
    return x if mask is None or x.ndim != 3 or x.shape[:2] != mask.shape else x[mask]  # noqa: PLR2004
