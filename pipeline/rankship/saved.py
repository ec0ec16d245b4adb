"""A saved model, as a module again."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.factors.saved_model import load_model

if TYPE_CHECKING:
    from torch import nn


def load(folder: str | os.PathLike[str], into: "nn.Module | None" = None) -> "nn.Module":
    """The model that `save` or `export` wrote: an ordinary torch module in evaluation mode, float32 on the CPU.

    Reads safetensors and the plan; no pickle, and no code that a file names. A transformers model is made from its
    config.json by transformers' own class. `Compressed.from_pretrained` gives the plan beside the module.

    Args:
        folder: The folder that was written.
        into: The dense architecture, as it was before it was compressed, trained or not; it stays as it is. Needed for
            any model that is not transformers' own.

    Raises:
        InputError: The folder holds no saved model, the architecture is missing, or it is another one.

    Example:
        >>> import torch
        >>> import rankship as rs
        >>> def make():
        ...     return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> inputs = torch.randn(100, 32)
        >>> small = rs.compress(make(), inputs, kept_parameters=0.6, progress=False)
        >>> again = rs.load(small.save("out"), into=make())
        >>> torch.equal(again(inputs), small.module(inputs))
        True

    """
    module, _ = load_model(Path(folder), into)
    return module
