"""Files that generate: a decoder as a model to run, for `infer` a whole sequence, for `measure` one of two phases."""

from __future__ import annotations

from typing import Any

from .decoders import Decoder, open_decoder
from .limits import Limits, read_limits
from .protocol import Fault, Request
from .runtimes import Arrays, Loaded, Loader


class Singles:
    """The tokens after a prompt, each an array (1,), and how many of them the cache holds."""

    def __init__(self, tokens: list[Any]) -> None:
        self.tokens = tokens
        self.held = 0


def open_tokens(request: Request) -> Loader:
    """Return the loader for a request with `generation`, as its `phase` says; Fault bad_request for an unknown one."""
    limits, phase = read_limits(request), request.get("phase")
    if phase not in PHASES:
        raise Fault("bad_request", f"wrong in the request: phase {phase!r}")

    def load(path: str, threads: int) -> Loaded:
        decoder = open_decoder(request["format"], path, threads, request.get("delegate"))
        return PHASES[phase](decoder, fit_limits(limits, decoder))

    return load


def fit_limits(limits: Limits, decoder: Decoder) -> Limits:
    """Return the limits of a decoder whose file may say itself how many tokens it takes."""
    return limits._replace(context=min(limits.context, decoder.context or limits.context))


def take_tokens(arrays: Arrays, limits: Limits, more: int = 0) -> Any:  # noqa: ANN401 - numpy
    """Return one sample's tokens, int64 (n,); Fault bad_input unless they are the prompt's and `more`, and fit."""
    if [(str(one.dtype), one.shape[:-1]) for one in arrays] != [("int64", (1,))]:
        given = ", ".join(f"{one.dtype} {one.shape}" for one in arrays)
        raise Fault("bad_input", f"a decoder takes one sequence of int64 tokens at a time, given: {given}")
    tokens = arrays[0][0]
    if len(tokens) < limits.prompt + more:
        raise Fault("bad_input", f"{len(tokens)} tokens, expected {limits.prompt + more} or more")
    if len(tokens) > limits.context:
        raise Fault("bad_input", f"{len(tokens)} tokens do not fit the context of {limits.context}")
    return tokens


def follow(decoder: Decoder, limits: Limits) -> Loaded:
    """Run a whole sequence, the prompt at once, then single tokens: logits after each, (1, n - P + 1, vocabulary)."""
    import numpy as np

    def infer(tokens: Any) -> Any:  # noqa: ANN401 - numpy
        decoder.rewind(0)
        parts = [tokens[: limits.prompt], *split(tokens[limits.prompt :])]
        return np.stack([np.array(decoder.step(part)) for part in parts])

    return Loaded(lambda arrays: take_tokens(arrays, limits), infer, lambda logits: [logits[None]])


def prefill(decoder: Decoder, limits: Limits) -> Loaded:
    """Run the prompt, each time into an empty cache."""

    def infer(prompt: Any) -> Any:  # noqa: ANN401 - numpy
        decoder.rewind(0)
        return decoder.step(prompt)

    return Loaded(lambda arrays: take_tokens(arrays, limits)[: limits.prompt], infer, lambda logits: [logits])


def decode(decoder: Decoder, limits: Limits) -> Loaded:
    """Run one token after the other, the prompt being in the cache, and again from the prompt on after the last."""

    def prepare(arrays: Arrays) -> Singles:
        tokens = take_tokens(arrays, limits, more=1)
        decoder.rewind(0)
        decoder.step(tokens[: limits.prompt])
        return Singles(split(tokens[limits.prompt :]))

    def make_ready(singles: Singles) -> None:
        if singles.held == len(singles.tokens):
            decoder.rewind(limits.prompt)
            singles.held = 0

    def infer(singles: Singles) -> Any:  # noqa: ANN401 - numpy
        singles.held += 1
        return decoder.step(singles.tokens[singles.held - 1])

    return Loaded(prepare, infer, lambda logits: [logits], make_ready)


def split(tokens: Any) -> list[Any]:  # noqa: ANN401 - numpy
    """Split tokens into arrays of one."""
    return [tokens[place : place + 1] for place in range(len(tokens))]


# the phase of `measure`, None for `infer` → how the decoder is run
PHASES = {None: follow, "prefill": prefill, "decode": decode}
