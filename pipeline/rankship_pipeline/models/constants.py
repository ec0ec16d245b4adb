"""Knows the tensors of checkpoints that hold nothing trained: counters, positions, rotary tables, masks of attention.

A module computes them by itself, and newer versions of a library no longer store them. A file may lack them, or have
them beside others that do not.
"""

from fnmatch import fnmatchcase

from rankship_pipeline.models.weights import TensorHeader

_NAMES = (
    "num_batches_tracked",  # batch-norm's counter; torch before 0.4.1 stored none
    "position_ids",
    "token_type_ids",
    "inv_freq",
    "original_inv_freq",
    "relative_position_index",
    "masked_bias",
)
_MASKS = ("*attn.bias", "*attention.bias", "*attn_mask", "*causal_mask", "*attn.mask", "*attention.mask")
_TABLES = ("*rotary*.cos_cached", "*rotary*.sin_cached", "*rope*.cos_cached", "*rope*.sin_cached")


def is_constant(name: str, header: TensorHeader) -> bool:
    """Whether a tensor holds nothing trained. A mask has the name of a bias, but not its shape: (1, 1, n, n)."""
    if name.rpartition(".")[2] in _NAMES or any(fnmatchcase(name, pattern) for pattern in _TABLES):
        return True
    if not any(fnmatchcase(name, pattern) for pattern in _MASKS):
        return False
    *outer, rows, columns = (0, 0, *header.shape)
    square = len(header.shape) > 1 and rows == columns and set(outer) <= {0, 1}
    return square or name.endswith("attn_mask")
