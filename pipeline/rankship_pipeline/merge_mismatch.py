"""Every way in which checkpoints to merge differ, from headers and config.json alone, in one list."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankship_pipeline.errors import InputError, MergeMismatch
from rankship_pipeline.tensor_file import TYPES, Readable

# what a configuration may say otherwise without any number meaning another thing
_FREE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "model_type"}
_SHOWN = 40  # differences of one model that are worth reading


def check_alike(models: Mapping[str, tuple[Path, Mapping[str, Readable]]]) -> None:
    """Raise one MergeMismatch with every difference from the first model, each with what can be done about it."""
    (first, (folder, tensors)), *others = models.items()
    for name, (_, found) in models.items():
        for tensor, stored in found.items():
            if stored.type_name not in TYPES:
                raise InputError(
                    f"tensor {tensor} of {name} is stored as {stored.type_name}, which is not merged",
                    hint=f"store the model as one of {', '.join(TYPES)}",
                )
    complaints = []
    for name, (other, found) in others:
        lines = [*_compare_tensors(tensors, found), *_compare_settings(read_config(folder), read_config(other))]
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        complaints += [f"{name} against {first}: {line}" for line in [*lines[:_SHOWN], *more]]
    if complaints:
        raise MergeMismatch(
            "the checkpoints cannot be merged:\n  " + "\n  ".join(complaints),
            hint="merge models that were trained from one base and saved the same way",
        )


def _compare_tensors(left: Mapping[str, Readable], right: Mapping[str, Readable]) -> list[str]:
    lines = [
        f"{name}: missing; save both with the same tied weights and heads"
        for name in sorted(left.keys() - right.keys())
    ]
    lines += [f"{name}: unexpected; delete it, or give it to all" for name in sorted(right.keys() - left.keys())]
    for name in sorted(left.keys() & right.keys()):
        one, other = left[name], right[name]
        if one.shape != other.shape:
            what = "the vocabularies differ, resize both to one" if one.shape[1:] == other.shape[1:] else "another size"
            lines.append(f"{name}: shape {list(other.shape)} instead of {list(one.shape)}; {what}")
        elif one.dtype.is_floating_point != other.dtype.is_floating_point:
            lines.append(f"{name}: stored as {other.type_name} instead of {one.type_name}; undo the quantisation")
    return lines


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json; empty where there is none."""
    path = folder / "config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise InputError(f"{path} is not valid JSON", hint="copy it again from where the model came") from None
    return found


def _compare_settings(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    if not left or not right:
        return []
    return [
        f"config.json: {key} is {right.get(key)!r} instead of {left.get(key)!r}" + _advise(key)
        for key in sorted((left.keys() | right.keys()) - _FREE)
        if left.get(key) != right.get(key)
    ]


def _advise(key: str) -> str:
    if key in {"id2label", "label2id"}:
        return "; the heads answer other questions: keep one head per task, or train both for one label map"
    return "; resize both to one" if key == "vocab_size" else ""
