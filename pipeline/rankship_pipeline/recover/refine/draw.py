"""Draws the samples of a refinement step: equally many of every teacher's inputs, augmented as the recipe says."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.masks import find_mask
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.recipe.choices import Augmentation

BATCH = 128
_IMAGES = 4  # dimensions of a batch of them

Augment = Callable[[Tensor, torch.Generator], Tensor]


def draw_batches(
    pools: Sequence[Inputs],
    augmentation: Augmentation,
    model: nn.Module,
    generator: torch.Generator,
    size: int = BATCH,
) -> tuple[Inputs, list[Inputs]]:
    """Draw `size` samples, an equal share from every pool; returns one batch for `model`, and its part of each pool."""
    augment, count = AUGMENTS[augmentation], size // len(pools)
    drawn = [_draw(pool, count, augment, generator) for pool in pools]
    joined = _arrange(model, tuple(torch.cat(parts) for parts in zip(*drawn, strict=True)))
    sizes = [len(one[0]) for one in drawn]
    return joined, list(zip(*(torch.split(tensor, sizes) for tensor in joined), strict=True))


def _draw(inputs: Inputs, count: int, augment: Augment | None, generator: torch.Generator) -> Inputs:
    picked = torch.randint(len(inputs[0]), (max(1, min(count, len(inputs[0]))),), generator=generator)
    batch = tuple(tensor[picked] for tensor in inputs)
    return batch if augment is None else (augment(batch[0], generator), *batch[1:])


def _arrange(model: nn.Module, batch: Inputs) -> Inputs:
    """The same batch in a faster form: without positions that all samples mask, images with channels last."""
    mask = find_mask(model, batch)
    if mask is not None:
        width = int(mask.any(0).nonzero().max()) + 1
        return tuple(tensor[:, :width] if tensor.shape == mask.shape else tensor for tensor in batch)
    return tuple(
        tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == _IMAGES else tensor for tensor in batch
    )


def flip_and_shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images (samples, channels, height, width) and move each by up to 4 pixels."""
    flipped = torch.rand(len(images), generator=generator) < 0.5  # noqa: PLR2004 - half
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    height, width = images.shape[2:]
    rows, columns = torch.randint(9, (2, len(images)), generator=generator)
    moved = [
        one[:, top : top + height, left : left + width]
        for one, top, left in zip(padded, rows.tolist(), columns.tolist(), strict=True)
    ]
    return torch.stack(moved)


AUGMENTS: dict[Augmentation, Augment | None] = {"none": None, "flip-and-shift": flip_and_shift}
