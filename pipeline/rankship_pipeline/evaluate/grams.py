"""Sums the Gram matrix of every layer's inputs over the calibration samples."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import (
    Grams,
    find_dtype,
    fit_batch,
    fit_outputs,
    join_embeddings,
    share_rows,
    split,
)
from rankship_pipeline.evaluate.long_kernels import add_patches, is_long
from rankship_pipeline.evaluate.masks import Masks, find_masks, pick_mask
from rankship_pipeline.evaluate.rows import (
    as_rows,
    count_rows,
    pad_input,
    sample_outputs,
    sample_patches,
    sample_places,
    sample_rows,
)
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Convolution, Factorable, Layer, get_layer
from rankship_pipeline.models.outputs import call
from rankship_pipeline.models.watch import watch

_BLOCK = 512  # columns that are multiplied at once
_BYTES = 2**29  # of one layer's input, patches and output in a batch
# Occurrences added to every token of an embedding, so that tokens absent from the calibration data count too.
TOKEN_SMOOTHING = 0.1


def collect_grams(model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> Grams:
    """Run all samples through the model and sum each layer's uncentred Gram, (columns, columns).

    The rows of X are a linear layer's tokens, a convolution's im2col patches or a transposed one's positions; padding
    does not count. The Gram is divided by the number of samples, so that models calibrated on different amounts of
    data weigh the same. An embedding's inputs are one-hot, so its Gram is the diagonal of token frequencies,
    (columns,). Only one batch of activations is in memory. A head that is tied to an embedding has a Gram under its own
    name; embeddings that are tied to each other count as one.

    Those of many columns are of float32 (see `find_dtype`). Of a layer with many more rows than columns, every sample
    shows some positions only, others each (see `share_rows`). Layers that read the same tensors are multiplied once.
    Of a layer that `is_wide` it is the Gram of its outputs without bias, W·G·Wᵀ (rows, rows).
    """
    uses = {use.name: use for layer in layers for use in layer.uses}
    kept_under = join_embeddings(layers)
    grams = {name: _start_gram(uses[name]) for name in kept_under.values()}
    modules = {name: get_layer(model, name) for name in uses}
    wide = {name for name, use in uses.items() if use.is_wide}
    alike, needed = _look_at_one(model, inputs, modules, grams, wide)
    samples, turns = len(inputs[0]), Counter[str]()
    batch, masks = inputs, Masks()  # those that are running

    def add(name: str, x: Tensor, y: Tensor) -> None:
        gram, module, mask = grams[kept_under[name]], modules[name], pick_mask(masks, x.shape)
        if gram.ndim == 1:
            gram += torch.bincount(as_rows(module, x, mask), minlength=len(gram))
            return
        turns[name] += 1
        find_share = partial(share_rows, len(gram), batch=len(batch[0]), samples=samples)
        if name in wide:
            plain = _drop_bias(module, y)
            _add_squares(gram, *sample_outputs(module, plain, pick_mask(masks, y.shape), find_share, turns[name]))
            return
        share = find_share(count_rows(module, x, y, mask))
        if isinstance(module, Convolution) and share < 1:
            places = sample_places(y[0, 0].numel(), share, turns[name] * len(y), len(y))
            _add_squares(gram, sample_patches(module, x, places), y[0, 0].numel() / places.shape[1])
        elif isinstance(module, Convolution) and is_long(module):
            padded, padding = pad_input(module, x)
            add_patches(gram, module, padded, tuple(padding))
        else:
            _add_squares(gram, *sample_rows(as_rows(module, x, mask), share, turns[name]))

    with torch.inference_mode(), watch(model, set(alike.values()), add):
        for batch in split(inputs, fit_batch(needed, _BYTES)):
            masks = find_masks(model, batch)
            model(*batch)
    for gram in grams.values():
        _mirror(gram)
        gram.div_(samples)
    return {name: gram if alike.get(name, name) == name else grams[alike[name]].clone() for name, gram in grams.items()}


def _look_at_one(
    model: nn.Module, inputs: Inputs, modules: Mapping[str, Factorable], grams: Grams, wide: set[str]
) -> tuple[dict[str, str], int]:
    """For every layer the first one that has the same Gram, and the bytes that one sample needs.

    Those are layers that read the same rows; a `wide` one has the Gram of its own outputs. The bytes are those of the
    largest layer, or of the model's outputs.
    """
    seen: dict[str, list[object]] = {name: [_describe_rows(module)] for name, module in modules.items()}
    held: list[Tensor] = []  # so that no other tensor takes an id
    needed = 0

    def see(name: str, x: Tensor, y: Tensor) -> None:
        nonlocal needed
        held.append(x)
        # A tensor that is overwritten is another one.
        seen[name].append((id(x), 0 if x.is_inference() else x._version))  # noqa: SLF001
        columns = len(grams[name]) if name in grams and grams[name].ndim > 1 else 0
        rows = count_rows(modules[name], x, y, None)
        patches = math.ceil(min(1, share_rows(columns, rows, 1, len(inputs[0]))) * rows) * columns * y.element_size()
        needed = max(needed, x.nbytes + y.nbytes + patches)

    with torch.inference_mode(mode=False), torch.no_grad(), watch(model, modules, see):
        found = call(model, tuple(tensor[:1] for tensor in inputs))
    needed = max(needed, _BYTES // fit_outputs(found))
    first: dict[tuple[object, ...], str] = {}
    own = {name for name in modules if len(seen[name]) == 1 or name not in grams or grams[name].ndim == 1} | wide
    alike = {name: first.setdefault(tuple(seen[name]), name) for name in modules if name not in own}
    return {**alike, **{name: name for name in own}}, needed


def _describe_rows(module: Factorable) -> tuple[object, ...]:
    """What decides, beside the tensor itself, which rows of it a layer reads."""
    if not isinstance(module, Convolution):
        return (type(module) in {nn.ConvTranspose1d, nn.ConvTranspose2d},)
    return module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode


def _drop_bias(module: Factorable, y: Tensor) -> Tensor:
    """A layer's output without its bias."""
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is None:
        return y
    return y - (bias.reshape(-1, *[1] * (y.ndim - 2)) if isinstance(module, Convolution) else bias)


def _add_squares(gram: Tensor, rows: Tensor, weight: float) -> None:
    """Add `weight`·XᵀX of rows X (positions, columns) to the upper blocks of a Gram; `_mirror` fills it up."""
    rows = rows.to(gram.dtype)
    for start in range(0, len(gram), _BLOCK):
        gram[start : start + _BLOCK, start:].addmm_(rows[:, start : start + _BLOCK].T, rows[:, start:], alpha=weight)


def _mirror(gram: Tensor) -> None:
    """Fill the blocks that `_add_squares` left out; a diagonal Gram (n,) has none."""
    for start in range(_BLOCK, len(gram) if gram.ndim > 1 else 0, _BLOCK):
        gram[start:, start - _BLOCK : start] = gram[start - _BLOCK : start, start:].T


def _start_gram(layer: Layer) -> Tensor:
    if layer.kind == "embedding":
        return torch.full((layer.columns,), TOKEN_SMOOTHING, dtype=torch.float64)
    size = layer.rows if layer.is_wide else layer.columns
    return torch.zeros(size, size, dtype=find_dtype(size))
