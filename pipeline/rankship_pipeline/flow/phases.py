"""The call sites of a language model's layers in one phase of generating: a prompt at once, or a single token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rankship_pipeline.export.decoders.cached import find_model
from rankship_pipeline.export.decoders.runs import list_runs
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.call_sites import Site, watch_sites


def find_phase_sites(
    module: nn.Module, layers: Sequence[Layer], key: ArtifactKey, context: int
) -> dict[str, tuple[Site, ...]]:
    """The sites of every layer by its name in the key's phase, one for each call of it in its format's file.

    A token is one row of every layer, and of a prompt only the last one is a row of the head.
    """
    model: Any = find_model(module)
    rows = [1] if key.prompt_tokens is None else list_runs(key.format, key.prompt_tokens, context)
    runs = [(count, place == len(rows)) for place, count in enumerate(rows, start=1)]

    def run(count: int, *, answers: bool) -> None:
        tokens = torch.zeros(1, count, dtype=torch.int64)
        if answers:
            model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        else:
            model.base_model(input_ids=tokens, use_cache=False)

    def find(count: int, *, answers: bool) -> dict[str, tuple[Site, ...]]:
        return watch_sites(module, layers, lambda: run(count, answers=answers))

    found = {one: find(one[0], answers=one[1]) for one in dict.fromkeys(runs)}
    return {layer.name: tuple(site for one in runs for site in found[one][layer.name]) for layer in layers}
