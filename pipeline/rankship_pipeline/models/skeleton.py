"""What only a model's modules say of its tensors: which are stored transposed, which are one with several names."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.huggingface import resolve_config

_UNNAMED = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")  # for a configuration without architectures


@dataclass(frozen=True)
class Skeleton:
    """`transposed` are weights stored as (inputs, outputs); `twins` maps a tensor to its other names, if it is tied.

    `backbone` is the part of names that checkpoints have or lack, as transformers loads both; empty for other models.
    """

    transposed: frozenset[str] = frozenset()
    twins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    backbone: str = ""

    def find_name(self, name: str, known: Container[str]) -> str:
        """A tensor's name among the known ones, with or without the backbone's; unchanged if it is none of them."""
        bare = name.removeprefix(f"{self.backbone}.")
        return next((one for one in (name, bare, f"{self.backbone}.{bare}") if one in known), name)


def read_skeleton(module: nn.Module) -> Skeleton:
    """A module's skeleton."""
    from transformers.pytorch_utils import Conv1D

    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return Skeleton(
        transposed=frozenset(f"{name}.weight" for name, one in module.named_modules() if isinstance(one, Conv1D)),
        twins={
            name: tuple(one for one in group if one != name)
            for group in groups.values()
            for name in group
            if len(group) > 1
        },
        backbone=str(getattr(module, "base_model_prefix", "")),
    )


def read_folder_skeleton(folder: Path) -> Skeleton | None:
    """The skeleton of the architecture that a folder's config.json names, None if transformers does not know it."""
    import transformers

    try:
        config: Any = resolve_config(folder)
    except InputError:
        return None
    for name in config.architectures or _UNNAMED:
        kind = getattr(transformers, name, None)
        try:
            with torch.device("meta"):  # shapes without numbers
                return read_skeleton(kind.from_config(config) if name in _UNNAMED else kind(config))  # type: ignore[union-attr,misc]
        except (AttributeError, TypeError, ValueError):
            continue
    return None
