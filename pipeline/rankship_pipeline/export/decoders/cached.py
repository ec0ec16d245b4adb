"""Runs a transformers language model with a cache of keys and values that its caller keeps.

The model's own code computes everything but the attention, whose keys and values for all places the caller gives back,
and the mask, which the caller makes from places. So no format's file depends on how transformers keeps its caches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError, UnsupportedOp
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.models.huggingface import ByPosition

Update = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a layer, its new keys and values (1, heads, places, size): those of all places, in the order of the mask."""

HIDDEN = -1e9  # what a score gets that must not count: its exponential is 0
_ATTENTION = "rankship_grouped"
_SIZES = "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_UNSTEADY_ROPE = {"dynamic", "longrope"}  # its angles depend on the length of the whole text


@record
class Shape:
    """The sizes of a decoder's cache: its layers, heads of keys and values, and numbers a head; vocabulary, context."""

    layers: int
    heads: int
    size: int
    vocabulary: int
    context: int


def find_model(module: nn.Module) -> nn.Module:
    """The transformers model in a module that wraps one; InputError for any other."""
    model = module.model if isinstance(module, ByPosition) else module
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise InputError(
            f"{type(module).__name__} is no language model of transformers: it cannot be exported with a cache",
            hint="give a Hugging Face model, or export it at a fixed length",
        )
    return model


def read_shape(model: nn.Module, generation: Generation) -> Shape:
    """The sizes of a model's cache; InputError where the model cannot have one of the asked context."""
    whole: Any = model.config
    config = whole.get_text_config()
    kind = type(model).__name__
    unknown = [name for name in _SIZES if not isinstance(getattr(config, name, None), int)]
    if unknown:
        raise UnsupportedOp(
            f"{kind} says nothing of its {', '.join(unknown)}, which a cache needs",
            hint='state task = "text-generation": its files give the logits of whole texts',
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {_FULL, _SLIDING})
    if others:
        raise UnsupportedOp(
            f"{kind} has layers of {', '.join(others)}, which no file with a cache has",
            hint="models of full and sliding attention can be exported",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    if kinds & _UNSTEADY_ROPE:
        raise UnsupportedOp(
            f"{kind} turns its keys by angles that depend on the length of the text ({', '.join(map(str, kinds))})",
            hint="set rope_type to default in its config.json, and a context within what it was trained on",
        )
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and generation.context > most:
        raise InputError(f"{kind} has places for {most} tokens, context is {generation.context}", hint="lower context")
    if generation.vocabulary != config.vocab_size:
        raise InputError(
            f"{kind} has a vocabulary of {config.vocab_size}, not of {generation.vocabulary}",
            hint="take the tokenizer that belongs to the model",
        )
    told = [one for one in (generation.begin, *generation.ends) if one is not None]
    outside = [one for one in told if not 0 <= one < generation.vocabulary]
    if outside:
        raise InputError(
            f"a text begins or ends with token {outside[0]}, {kind} knows {generation.vocabulary}",
            hint="take the tokenizer that belongs to the model",
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        heads=heads,
        size=size,
        vocabulary=config.vocab_size,
        context=generation.context,
    )


class _Cache:
    """What a transformers model asks of its cache."""

    def __init__(self, update: Update) -> None:
        self._update = update

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return self._update(layer, keys.contiguous(), values.contiguous())  # as they are, tracing fixes their number

    def get_seq_length(self, _layer: int = 0) -> int:
        return 0  # places are always given


def run_cached(model: nn.Module, tokens: Tensor, places: Tensor, seen: Tensor, update: Update) -> Tensor:
    """The logits (1, 1, vocabulary) after the last of some tokens (1, n) at these places (n).

    `seen` (n, all places) says which places each of the tokens may see in a layer of full attention, as what is added
    to the scores: 0 or HIDDEN.
    """
    config: Any = model.config
    given: Any = seen[None, None]
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if window is not None and (_SLIDING in kinds or not kinds):
        all_places = torch.arange(seen.shape[1], dtype=places.dtype)
        far = places[:, None] - all_places[None] >= window
        sliding = seen[None, None] + torch.where(far, HIDDEN, 0.0)
        given = {_FULL: given, _SLIDING: sliding} if kinds else sliding
    found = model(
        input_ids=tokens,
        attention_mask=given,
        position_ids=places[None],
        past_key_values=_Cache(update),
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = found.logits
    return logits


def see_earlier(places: Tensor, others: Tensor) -> Tensor:
    """What is added to scores (n, others): 0 where a token at its place sees an other place, its own included."""
    return torch.where(others[None] <= places[:, None], 0.0, HIDDEN)


@contextmanager
def attend_by_groups(model: nn.Module) -> Iterator[None]:
    """Let a model compute its attention without copies of keys and values that several heads share, meanwhile."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    configs: dict[int, Any] = {id(one.config): one.config for one in model.modules() if hasattr(one, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}  # noqa: SLF001 - its own setting
    for config in configs.values():
        config._attn_implementation = _ATTENTION  # noqa: SLF001
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]  # noqa: SLF001


def _attend(
    _module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention (1, n, heads, size) of q (1, heads, n, size) on k, v (1, groups, places, size).

    The heads of a group are rows of one product.
    """
    if others.get("s_aux") is not None or others.get("sinks") is not None:
        raise UnsupportedOp("attention sinks cannot be exported with a cache", hint="export it at a fixed length")
    heads, n, size = q.shape[1:]
    groups = k.shape[1]
    rows = heads // groups
    grouped = (q[0].contiguous() * scaling).view(groups, rows, n, size).view(groups, rows * n, size)
    scores = torch.bmm(grouped, k[0].transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + (torch.cat([mask[0]] * rows, 1) if rows > 1 else mask[0])
    y = torch.bmm(torch.softmax(scores, -1), v[0])  # (groups, rows·n, size)
    heads_last = y.view(groups, rows, n, v.shape[-1]).permute(2, 0, 1, 3).contiguous()
    return heads_last.view(1, n, heads, v.shape[-1]), None
