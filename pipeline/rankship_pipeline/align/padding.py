"""Finds where two models' vocabularies differ only in rows that no token has: a table padded to a round number."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rankship_pipeline.align.facts import Facts
from rankship_pipeline.models.tensor_pieces import Readable

_SIZE = "vocab_size"


def find_padding(reference: Facts, other: Facts) -> dict[str, tuple[int, int]]:
    """The tensors, by name, whose rows are as many as each model's vocabulary: rows of the other and the reference.

    Empty unless both have one tokenizer and no token, nor a token that a configuration names, is beyond the fewer rows.
    """
    sizes = tuple(one.settings.get(_SIZE) for one in (other, reference))
    if not reference.tokens or reference.tokens != other.tokens or sizes[0] == sizes[1]:
        return {}
    found = {}
    for name in other.tensors.keys() & reference.tensors.keys():
        (mine, *rest), (theirs, *wanted) = (
            (*one.tensors[name].shape, 0) if not one.tensors[name].shape else one.tensors[name].shape
            for one in (other, reference)
        )
        if (mine, theirs) == sizes and rest == wanted:
            found[name] = (mine, theirs)
    named = [
        value
        for one in (reference, other)
        for key, value in one.settings.items()
        if key.endswith("_token_id") and isinstance(value, int)
    ]
    least = min((min(rows) for rows in found.values()), default=0)
    return found if max(*reference.tokens.values(), *named, 0) < least else {}


@dataclass(frozen=True)
class PaddedTensor:
    """A stored tensor cut or filled to the rows of the first model's; rows that it lacks are the first model's."""

    stored: Readable
    first: Readable

    @property
    def type_name(self) -> str:
        """The stored tensor's."""
        return self.stored.type_name

    @property
    def dtype(self) -> torch.dtype:
        """The stored tensor's."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The first model's."""
        return self.first.shape

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows, or all."""
        stop = self.shape[0] if stop is None else stop
        own = self.stored.shape[0]
        parts = [self.stored.read(min(start, own), min(stop, own))]
        if stop > own:
            parts.append(self.first.read(max(start, own), stop).to(parts[0].dtype))
        return torch.cat(parts)


def fill_rows(state: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state whose tables are cut or filled to the first model's rows; rows that it lacks are the first model's."""
    filled = {}
    for name, tensor in state.items():
        wanted = first[name]
        same = tensor.shape == wanted.shape
        filled[name] = tensor if same else torch.cat([tensor[: len(wanted)], wanted[len(tensor) :]]).clone()
    return filled
