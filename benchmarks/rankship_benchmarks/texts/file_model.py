"""A file that generates text, as a torch module: its logits come from its own runtime."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rankship_pipeline.export.runner import Runner
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.generation import Generation


class FileModel(nn.Module):
    """Maps token ids (batch, positions) to logits (batch, positions, vocabulary), one token after the other.

    So every logit comes from the file's cache, as when it generates. The agent runs the file in a process of its own.
    """

    def __init__(self, format_: Format, path: Path, generation: Generation, runner: Runner) -> None:
        super().__init__()
        self._format: Format = format_
        self._path = path
        self._generation = replace(generation, prompt_tokens=1)
        self._runner = runner

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the file; texts longer than its context are refused by the agent."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            np.save(folder / "tokens.npy", tokens.numpy())
            inputs = [folder / "tokens.npy"]
            found = self._runner.run(self._format, self._path, inputs, folder, generation=self._generation)
            return torch.from_numpy(np.load(found.outputs[0], allow_pickle=False))
