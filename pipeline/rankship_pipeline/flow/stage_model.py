"""A model that a stage made or loaded."""

from dataclasses import dataclass

from torch import nn

from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.store import Entry


@dataclass(frozen=True)
class Model:
    """A torch module in evaluation mode, the store entry with its tensors, and the hash of its own files.

    `batchnorm_reestimated` says whether its batch-norm statistics were re-estimated.
    """

    module: nn.Module
    entry: Entry
    files_sha256: str
    batchnorm_reestimated: bool = False

    @property
    def content(self) -> str:
        """The hash that later stages depend on: of its tensors and its code."""
        return digest([self.entry.content, self.files_sha256])
