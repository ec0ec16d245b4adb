"""Simulates in torch how runtimes round activations as they run: the reference of a file with dynamic activations.

Weights on their grid need no simulation: they are floats that the file's integers and scales give exactly.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankship_pipeline.export.rounded_weight import RoundedWeight
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.models.layers import find_kind

LEAST = 1e-12  # the step of a row is no less
_NO_BLOCK = 0
BLOCKS = (16, 32, 64, 128, 256)  # that MatMulNBits takes
_PAYS = 70  # rows·columns over their sum


def simulate_activations(module: nn.Module, weights: Sequence[RoundedWeight], format_name: Format) -> nn.Module:
    """A copy of a module whose layers of these names round what they read, as the format's runtime does.

    Layers that are neither linear nor named keep float32 activations, and so do embeddings.
    """
    changed = copy.deepcopy(module)
    for one in weights:
        layer = changed.get_submodule(one.name)
        if find_kind(layer) == "linear" and rounds_activations(one, format_name):
            change_input(layer, _round_as(one, format_name))
    return changed


def rounds_activations(one: RoundedWeight, format_name: Format) -> bool:
    """Whether the activations of a linear layer are rounded in files of a format; if not, its weights alone are.

    In ONNX, rounding takes the time of about 45·(1/rows + 1/columns) of the product in float32, and saves two thirds of
    it: narrow layers would be slower than in float32 (benchmarks/baselines/capabilities.json).
    """
    if format_name != "onnx":
        return True
    rows, columns = one.integers.shape
    return one.block in BLOCKS if one.precision == "int4" else rows * columns >= _PAYS * (rows + columns)


def _round_as(one: RoundedWeight, format_name: Format) -> Callable[[Tensor], Tensor]:
    rounding = ROUNDINGS[format_name, one.precision]
    return lambda x: rounding(x, one.block)


def change_input(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let a layer of one input read what `change` makes of it, from now on."""

    def hook(_layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[Any, Any]:
        return tuple(map(change, given)), {name: change(one) for name, one in named.items()}

    layer.register_forward_pre_hook(hook, with_kwargs=True)


Rounding = Callable[[Tensor, int], Tensor]


def round_rows(x: Tensor, _block: int = _NO_BLOCK) -> Tensor:
    """Each row in 256 steps from its least to its largest number, with 0 among them: what our ONNX files compute."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    step = ((high - low) * torch.tensor(1 / 255, dtype=x.dtype)).clamp_min(LEAST)
    zero = -torch.round(low / step)
    return ((torch.round(x / step) + zero).clamp(0, 255) - zero) * step


def round_rows_around_zero_point(x: Tensor, _block: int = _NO_BLOCK) -> Tensor:
    """The same as XNNPACK computes it, with the steps' inverse and numbers around 0: qd8."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    steps = torch.where(high > low, 255 / (high - low), torch.ones_like(high))
    zero = torch.round((-128 - low * steps).clamp(-128, 127))
    numbers = (torch.round(x * steps) + zero).clamp(-128, 127)
    return (numbers - zero) / steps


def round_blocks(x: Tensor, block: int) -> Tensor:
    """Each block of a row in whole numbers from −127 to 127 of its largest: onnxruntime's MatMulNBits, level 4."""
    parts = x.reshape(*x.shape[:-1], -1, block)
    largest = parts.abs().amax(-1, keepdim=True)
    scale = largest / 127
    back = torch.where(largest > 0, 127 / largest, torch.zeros_like(largest))
    return (torch.round(parts * back) * scale).flatten(-2)


ROUNDINGS: dict[tuple[Format, Precision], Rounding] = {
    ("onnx", "int8"): round_rows,
    ("onnx", "int4"): round_blocks,
    ("tflite", "int8"): round_rows_around_zero_point,
    ("tflite", "int4"): round_rows_around_zero_point,
    ("executorch", "int8"): round_rows_around_zero_point,
    ("executorch", "int4"): round_rows_around_zero_point,
}
