"""The input of `rankship merge`: one TOML file that names checkpoints on disk and how to merge them."""

from pathlib import Path
from typing import Literal

from rankship_pipeline.foundation.codec import read_toml
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.recipe.choices import MergeChoice
from rankship_pipeline.recipe.merge_methods import METHODS, check_count, check_settings

_ADAPTER = "adapter_config.json"  # a folder with this file is an adapter, which is added to the base
FloatType = Literal["float64", "float32", "float16", "bfloat16"]


@record
class MergeFile:
    """Merge checkpoint folders (safetensors, sharded or not; relative to the file) into one folder, without data.

    A folder may hold a LoRA adapter, which is added to `base`, the folder of the model that all were trained from.
    `merge` is a recipe's [merge] with a method that needs no data. `dtype` is the type that floating-point tensors are
    stored in, None for the first model's own.
    """

    models: tuple[str, ...]
    base: str | None = None
    merge: MergeChoice = MergeChoice(method="average")
    dtype: FloatType | None = None
    seed: int = 0


def read_merge_file(path: Path) -> MergeFile:
    """Read and check the file; InputError lists every mistake with the file and the key."""
    asked = read_toml(MergeFile, path, "merge")
    method, choice = asked.merge.method, asked.merge
    complaints = check_settings([("merge", method)], choice.given, has_base=asked.base is not None)
    complaints += check_count([("merge", method)], len(asked.models))
    if METHODS[method].data != "none":
        free = ", ".join(name for name, needs in METHODS.items() if needs.data == "none")
        complaints.append(f"merge: {method!r} needs data, which only a recipe has: take one of {free}")
    if not asked.models:
        complaints.append("models is empty: name the checkpoints' folders")
    if choice.base is not None or choice.batchnorm != "auto":
        complaints.append("merge.base and merge.batchnorm belong to recipes: write base = FOLDER at the top")
    if choice.align is not None:
        complaints.append("merge.align belongs to recipes: it needs a model's code and samples")
    has_adapters = any((path.parent / name / _ADAPTER).is_file() for name in asked.models)
    if asked.base is not None and not METHODS[method].base and not has_adapters:
        complaints.append(f"the method {method!r} does not use base: leave it out")
    if complaints:
        raise InputError(f"{path}: " + "; ".join(complaints), hint="correct the file and run again")
    return asked
