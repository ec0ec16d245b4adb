"""Finds the table that a model reads its tokens by."""

import torch
from torch import Tensor, nn

from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.watch import watch

_TOKENS = 2  # dimensions of (samples, positions)


@torch.inference_mode()
def find_token_table(model: nn.Module, inputs: Inputs) -> tuple[Tensor, nn.Embedding] | None:
    """The input (1, positions) of whole numbers whose rows a table gives, of one sample, and the table.

    Tables of positions and kinds of tokens are read by other numbers. None where no input is read so.
    """
    given = tuple(tensor[:1] for tensor in inputs)
    tables = {name: one for name, one in model.named_modules() if isinstance(one, nn.Embedding)}
    found: list[tuple[Tensor, nn.Embedding]] = []

    def see(name: str, x: Tensor, _y: Tensor) -> None:
        same = (one for one in given if one.ndim == _TOKENS and one.shape == x.shape and bool((one == x).all()))
        found.extend((one, tables[name]) for one in same)

    if tables:
        with watch(model, tables, see):
            model(*given)
    return max(found, key=lambda one: one[1].num_embeddings, default=None)
