"""Runs a model over calibration samples batch by batch, and keeps what two halves of them give apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.likelihood import Likelihood, assume_logits, measure_scales
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.models.outputs import Outputs, call, join_batches

Grams = Mapping[str, Tensor]
Collect = Callable[[nn.Module, Inputs, Sequence[Layer]], Grams]
BATCH = 64
OUTPUT_BYTES = 2**29  # of a model's outputs in a batch: a language model's are far larger than all else
EXACT = 512  # columns of a Gram up to which its products are of float64
# Rows that a layer's matrix is made of: per column, and at least.
_ENOUGH, _FEW = 64, 2**15


def find_scales(model: nn.Module, inputs: Inputs, likelihood: Likelihood | None) -> tuple[Likelihood, Outputs]:
    """The likelihood, if None logits by assumption, and the standard deviations of the columns of other outputs."""
    if likelihood is None:
        likelihood = assume_logits(predict(model, tuple(tensor[:1] for tensor in inputs)))
    if all(answer.is_choice for answer in likelihood.values()):
        return likelihood, {}
    return likelihood, measure_scales(_run(model, inputs), likelihood)


@torch.inference_mode()
def predict(model: nn.Module, inputs: Inputs) -> Outputs:
    """The model's outputs by name, samples first, computed batch by batch."""
    return join_batches(list(_run(model, inputs)))


@torch.inference_mode()
def _run(model: nn.Module, inputs: Inputs) -> Iterator[Outputs]:
    """The model's outputs of one row for each sample, by name, batch by batch; no others can be joined."""
    size = fit_outputs(call(model, tuple(tensor[:1] for tensor in inputs)))
    for batch in split(inputs, size):
        yield {name: one for name, one in call(model, batch).items() if one.ndim and len(one) == len(batch[0])}


def collect_halves(collect: Collect, model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> Grams:
    """What `collect` gives on the even and on the odd samples, stacked: (2, columns, columns) or (2, columns).

    How far the two differ says how much of either is chance (see factors/shrink.py). One sample has no halves: nothing
    is known of others, and its own matrix stands beside zeros.
    """
    if len(inputs[0]) == 1:
        return {name: torch.stack([one * 2, 0 * one]) for name, one in collect(model, inputs, layers).items()}
    even, odd = (dict(collect(model, tuple(tensor[at::2] for tensor in inputs), layers)) for at in (0, 1))
    return {name: torch.stack([even.pop(name), odd.pop(name)]) for name in list(even)}  # never all of them twice


def find_dtype(columns: int) -> torch.dtype:
    """What a matrix of so many columns is summed and kept in.

    One of few columns costs little, and is exact: float32 could make a singular one indefinite.
    """
    return torch.float64 if columns <= EXACT else torch.float32


def thin(inputs: Inputs, most: int) -> Inputs:
    """At most so many of the samples, evenly spread."""
    samples = len(inputs[0])
    chosen = torch.linspace(0, samples - 1, min(most, samples)).round().long()
    return inputs if samples <= most else tuple(tensor[chosen] for tensor in inputs)


def split(inputs: Inputs, size: int = BATCH) -> list[Inputs]:
    """Split samples into the fewest batches of at most `size`, as even as possible for averages over batches."""
    count = -(-len(inputs[0]) // size)
    return list(zip(*(tensor.tensor_split(count) for tensor in inputs), strict=True))


def fit_batch(needed: int, allowed: int, most: int = BATCH) -> int:
    """The number of samples, 1 to `most`, that `allowed` bytes hold if one needs `needed`."""
    return max(1, min(most, allowed // max(1, needed)))


def fit_outputs(outputs: Outputs, most: int = BATCH, allowed: int | None = None) -> int:
    """The number of samples, 1 to `most`, whose outputs take at most `allowed` bytes (None: OUTPUT_BYTES)."""
    needed = sum(one.nbytes / max(1, len(one)) for one in outputs.values())
    return fit_batch(int(needed), OUTPUT_BYTES if allowed is None else allowed, most)


def share_rows(columns: int, rows: int, batch: int, samples: int) -> float:
    """The share of a call's `rows` that a matrix of so many columns is made of; a `batch` of all `samples` is running.

    A matrix from N rows is off by columns / N; positions of one sample resemble each other, so that all samples count.
    """
    return max(_ENOUGH * columns, _FEW) * batch / max(1, rows * samples)


def join_embeddings(layers: Sequence[Layer]) -> dict[str, str]:
    """The name under which a module's matrix is kept, by the name of every module that computes with a weight."""
    return {use.name: layer.name if use.kind == "embedding" else use.name for layer in layers for use in layer.uses}
