"""GPT-2's linear layer, which transformers does not type."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def make_conv1d(inputs: int, outputs: int) -> nn.Linear:
    """A Conv1D, typed as the layer that it stands for; transformers names the outputs first."""
    made: nn.Linear = Conv1D(outputs, inputs)  # type: ignore[assignment,no-untyped-call]
    return made
