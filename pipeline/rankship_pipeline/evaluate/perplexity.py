"""Measures a causal language model's perplexity.

A language model here maps token ids (batch, positions) to logits (batch, positions, vocabulary); a transformers model
becomes one as `huggingface.ByPosition(model, ("input_ids",))`. Its attention must be causal: padding stands on the
right and is not masked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import exp, inf, isfinite, sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from rankship_pipeline.foundation.errors import InputError, MeasurementError
from rankship_pipeline.foundation.frozen import record

NOT_SCORED = -100  # the label that cross_entropy and transformers ignore
BATCH = 8  # windows per forward pass
_TWO_SIDED_95 = 0.975
_MOST_NATS = 700.0  # exp of much more overflows a float


@record
class Perplexity:
    """exp(mean negative log-likelihood per scored token), and how it was measured.

    `length_tokens` is the window length in positions, `stride_tokens` the step from one window to the next (None for
    separate documents). `low` and `high` are the 95 % interval of the perplexity over `blocks` of text (see
    `summarise`); None for fewer than two blocks.
    """

    perplexity: float
    mean_nll_nats: float
    scored_tokens: int
    length_tokens: int
    stride_tokens: int | None
    blocks: int
    low: float | None
    high: float | None


def measure_perplexity(model: nn.Module, tokens: Tensor, *, length: int, stride: int, batch: int = BATCH) -> Perplexity:
    """Perplexity of one text, token ids (tokens,), in windows of `length` input positions that begin `stride` apart.

    Every token after the first is scored exactly once, in the first window that reaches it: behind `length` - `stride`
    to `length` tokens of context, except in the first window. This is the sliding window of the Hugging Face
    documentation ("Perplexity of fixed-length models") with its max_length = `length` + 1: there a window's last token
    is only predicted, here it is not an input, so that with `stride` = `length` every token is scored.

    Raises InputError for a text of under two tokens, anything but one row of whole numbers, or a stride outside
    1 … `length`, and MeasurementError if the model gives NaN or infinity.
    """
    begins = list_begins(tokens, length, stride)
    scores = score_windows(model, (cut_window(tokens, begin, length, stride) for begin in begins), batch)
    together = -(-length // stride)  # windows that share tokens are correlated
    block = torch.arange(len(begins)) // together
    blocks = Scores(*(block.bincount(one) for one in (scores.sums, scores.counts, scores.hits)))
    return summarise(blocks, length, stride)


def list_begins(tokens: Tensor, length: int, stride: int) -> range:
    """The first token of every window of a text; errors are those of `measure_perplexity`."""
    if tokens.ndim != 1 or tokens.is_floating_point() or len(tokens) < 2:  # noqa: PLR2004 - the first is not scored
        raise InputError(
            f"the perplexity of {tokens.dtype} of shape {list(tokens.shape)} is not defined",
            hint="give one row of at least two token ids",
        )
    if not 1 <= stride <= length:
        raise InputError(
            f"stride {stride} is not between 1 and the length {length}",
            hint="choose a stride from 1 to the length, so that every token is scored",
        )
    return range(0, max(1, len(tokens) - 1 - (length - stride)), stride)


def measure_labelled_perplexity(model: nn.Module, inputs: Tensor, labels: Tensor, *, batch: int = BATCH) -> Perplexity:
    """Perplexity over separate documents: token ids and labels, both (documents, positions), padded on the right.

    labels[d, i] is the token that should follow inputs[d, i] (already shifted, unlike the labels of transformers' own
    loss); −100 is not scored, and any valid id may pad the inputs. Raises InputError if the shapes differ or nothing is
    scored.
    """
    if inputs.ndim != 2 or inputs.shape != labels.shape or not bool((labels != NOT_SCORED).any()):  # noqa: PLR2004
        raise InputError(
            f"inputs of shape {list(inputs.shape)}, labels of shape {list(labels.shape)}: nothing can be scored",
            hint="give both as (documents, positions), with the next token as label at every position to score",
        )
    scores = score_windows(model, zip(inputs, labels, strict=True), batch)
    return summarise(scores, inputs.shape[1])


@dataclass(frozen=True)
class Scores:
    """Per window, all (windows,): sum of nats (float64), tokens scored, tokens that were the model's first guess."""

    sums: Tensor
    counts: Tensor
    hits: Tensor


@torch.inference_mode()
def score_windows(model: nn.Module, windows: Iterable[tuple[Tensor, Tensor]], batch: int = BATCH) -> Scores:
    """Negative log-likelihoods of windows: token ids and the tokens that should follow them, both (positions,).

    Label −100 is not scored. Windows may differ in length. Only one batch of logits is in memory.
    """
    rest, scores = iter(windows), []
    training = [module for module in model.modules() if module.training]
    model.eval()  # no dropout while measuring
    try:
        while chunk := list(islice(rest, batch)):
            scores.append(_score_batch(model, chunk))
    finally:
        for module in training:
            module.training = True
    return join_scores(scores)


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of all windows, in order."""
    return Scores(*(torch.cat([getattr(one, name) for one in parts]) for name in ("sums", "counts", "hits")))


def _score_batch(model: nn.Module, windows: list[tuple[Tensor, Tensor]]) -> Scores:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = pad_sequence([inputs for inputs, _ in windows], batch_first=True).to(device)
    labels = pad_sequence([labels for _, labels in windows], batch_first=True, padding_value=NOT_SCORED).to(device)
    scored = labels != NOT_SCORED
    logits = model(inputs)[scored].float()  # (scored, vocabulary)
    losses = cross_entropy(logits, labels[scored], reduction="none").double().cpu()
    right = (logits.argmax(-1) == labels[scored]).cpu()
    owner = scored.nonzero()[:, 0].cpu()  # each scored token's window
    sums = torch.bincount(owner, losses, len(windows))
    return Scores(sums, *(torch.bincount(which, minlength=len(windows)) for which in (owner, owner[right])))


def cut_window(tokens: Tensor, begin: int, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """The window's inputs and labels, each (at most `length`,); labels that an earlier window scored are masked."""
    end = min(begin + length, len(tokens) - 1)
    labels = tokens[begin + 1 : end + 1].to(torch.int64, copy=True)
    if begin:
        labels[: length - stride] = NOT_SCORED
    return tokens[begin:end], labels


def summarise(scores: Scores, length: int, stride: int | None = None) -> Perplexity:
    """The mean over all tokens and its 95 % interval from blocks: their summed nats and token counts, both (blocks,).

    Blocks without a token do not count. Tokens of one window or document are correlated, blocks of a whole `length`
    nearly independent. Student's t on the blocks (ratio estimator, Cochran 1977 §6.3) respects that, needs no seed and
    weighs a short last block correctly.
    """
    counted = scores.counts > 0
    sums, counts = scores.sums[counted], scores.counts[counted]
    scored, blocks = int(counts.sum()), len(counts)
    mean = float(sums.sum()) / scored
    if not isfinite(mean):
        raise MeasurementError(
            f"the model's mean negative log-likelihood is {mean}", hint="look for NaN or overflow in its weights"
        )
    low = high = None
    if blocks > 1:
        from scipy.stats import t

        residuals = sums - mean * counts
        error = sqrt(float((residuals**2).sum()) * blocks / (blocks - 1)) / scored
        spread = float(t.ppf(_TWO_SIDED_95, blocks - 1)) * error
        low, high = _exponentiate(mean - spread), _exponentiate(mean + spread)
    return Perplexity(
        perplexity=_exponentiate(mean),
        mean_nll_nats=mean,
        scored_tokens=scored,
        length_tokens=length,
        stride_tokens=stride,
        blocks=blocks,
        low=low,
        high=high,
    )


def _exponentiate(nats: float) -> float:
    return exp(nats) if nats < _MOST_NATS else inf
