"""Finds a batch's attention masks, so that padding counts in no statistic, score or distance."""

import inspect

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.remembered import Remembered
from rankship_pipeline.models.data import Inputs

Masks = tuple[Tensor, ...]  # (samples, positions) as booleans: of the encoder, or the only one; of the decoder
_NAMES = ("attention_mask", "mask", "decoder_attention_mask", "decoder_mask")


def find_masks(model: nn.Module, batch: Inputs) -> Masks:
    """The batch's attention masks; () if the model has no such input.

    They are known by their names: in `inputs` of a wrapped transformers model, else in `forward`'s signature; there
    they must hold only zeros and ones, too, and be as long as whole numbers beside them, the tokens that they mask.
    """
    model = model.module if isinstance(model, Remembered) else model
    named = getattr(model, "inputs", None)
    names = inspect.signature(model.forward).parameters if named is None else named
    found = {name: one for name, one in zip(names, batch, strict=False) if name in _NAMES}
    sure = named is not None
    return tuple(found[name].bool() for name in _NAMES if name in found and (sure or _masks_tokens(found[name], batch)))


def find_mask(model: nn.Module, batch: Inputs) -> Tensor | None:
    """The batch's one attention mask; None if the model has none, or an encoder's and a decoder's."""
    masks = find_masks(model, batch)
    return masks[0] if len(masks) == 1 else None


def pick_mask(masks: Masks, shape: torch.Size) -> Tensor | None:
    """The mask of a tensor whose shape begins with (samples, positions); None if none fits.

    Where an encoder's and a decoder's fit both, a position counts that counts in either: no real one is lost.
    """
    fitting = [one for one in masks if one.shape == shape[:2]]
    return torch.stack(fitting).any(0) if fitting else None


def _masks_tokens(tensor: Tensor, batch: Inputs) -> bool:
    masked = [one for one in batch if one is not tensor and one.shape == tensor.shape and not one.is_floating_point()]
    return tensor.ndim == 2 and bool(masked) and bool(((tensor == 0) | (tensor == 1)).all())  # noqa: PLR2004
