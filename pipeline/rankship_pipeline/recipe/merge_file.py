"""What `rankship merge` is asked for: one TOML file that names checkpoints on disk and how they become one."""

from pathlib import Path
from typing import Literal

from rankship_pipeline.foundation.codec import read_toml
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.records import record
from rankship_pipeline.recipe.choices import MergeChoice
from rankship_pipeline.recipe.merge_methods import METHODS, check_count, check_settings

_ADAPTER = "adapter_config.json"  # a folder that holds it is an adapter, which adds to the base
FloatType = Literal["float64", "float32", "float16", "bfloat16"]


@record
class MergeFile:
    """Checkpoint folders (safetensors, sharded or not), relative to the file, into one folder, without data.

    A folder may be that of a LoRA adapter, which is added to `base`, the folder of the model that all were trained
    from. `merge` is a recipe's [merge] with a method that
    needs no data. `dtype` is the type that floating-point tensors are stored in, None for the first model's own.
    """

    models: tuple[str, ...]
    base: str | None = None
    merge: MergeChoice = MergeChoice(method="average")
    dtype: FloatType | None = None
    seed: int = 0


def read_merge_file(path: Path) -> MergeFile:
    """Read and check; every mistake is an InputError that names the file and the key."""
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
    has_adapters = any((path.parent / name / _ADAPTER).is_file() for name in asked.models)
    if asked.base is not None and not METHODS[method].base and not has_adapters:
        complaints.append(f"base means nothing to the method {method!r}: leave it out")
    if complaints:
        raise InputError(f"{path}: " + "; ".join(complaints), hint="correct the file and run again")
    return asked
