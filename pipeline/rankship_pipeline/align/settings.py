"""What a model's configuration means: what affects the computation, whichever version of a library wrote it.

transformers reads a config.json and fills in its defaults, moves what older versions wrote elsewhere (`rope_theta`),
and keeps keys of which it knows nothing. What no value of the model depends on is left out here.
"""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.huggingface import resolve_config
from rankship_pipeline.models.model_config import read_json

# Keys of every configuration that do not affect the computation.
_NOT_SETTINGS = {
    "_name_or_path",
    "transformers_version",
    "transformers_weights",
    "dtype",
    "torch_dtype",
    "architectures",
    "auto_map",
    "tokenizer_class",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "torchscript",
}
_UNNAMED = re.compile(r"LABEL_\d+")
# Names of one activation.
_ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
# Types of rotary positions that do not depend on the greatest length (modeling_rope_utils).
_OF_ANY_LENGTH = {"default", "linear", "llama3"}
# Models that number positions from the padding token on.
_COUNT_PADDING = re.compile(r"roberta|camembert|mpnet|longformer|data2vec|ibert|esm|luke|layoutlmv3|m2m|xglm|fsmt|xmod")
LENGTH = "max_position_embeddings, a limit only"
# Where transformers' code reads a configuration, beside a model's own two files.
_SHARED = ("modeling_rope_utils.py", "masking_utils.py", "modeling_layers.py", "modeling_utils.py", "pytorch_utils.py")


def read_settings(folder: Path, *, labels: bool) -> dict[str, object]:
    """A model folder's settings, nested keys joined by dots; those of a model unknown to transformers as written.

    With `labels` the names of the classes are among them.
    """
    written = read_json(folder / "config.json")
    try:
        config = resolve_config(folder)
    except (InputError, ImportError):
        return flatten(_drop(written, labels=labels))
    found = config.to_dict()
    unread = _list_unread(config, found)
    return flatten(
        _settle(_drop({key: value for key, value in found.items() if key not in unread}, labels=labels), found)
    )


def _drop(config: Mapping[str, Any], *, labels: bool) -> dict[str, Any]:
    """The configuration without what affects no computation; class names that nobody gave are none."""
    names = (config.get("id2label") or {}).values()
    unnamed = all(_UNNAMED.fullmatch(str(one)) for one in names)
    left = _NOT_SETTINGS | (set() if labels and not unnamed else {"id2label", "label2id"})
    return {key: value for key, value in config.items() if key not in left}


def _settle(settings: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which equal computations have equal values."""
    settings = {key: _ALIASES.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
    ropes = _list_rope_types(config.get("rope_parameters"))
    if ropes and ropes <= _OF_ANY_LENGTH and "max_position_embeddings" in settings:
        settings[LENGTH] = settings.pop("max_position_embeddings")
    if not config.get("sliding_window"):
        settings.pop("max_window_layers", None)
    kinds = [str(name) for name in config.get("architectures") or []]
    is_generator = bool(kinds) and all(name.endswith("ForCausalLM") for name in kinds)
    if is_generator and not _COUNT_PADDING.search(str(config.get("model_type"))):
        settings.pop("pad_token_id", None)  # the mask hides the padding; a classifier looks for it
    return settings


def _list_rope_types(parameters: object) -> set[str]:
    """The types of rotary positions, one for all layers or one for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return set()
    if "rope_type" in parameters:
        return {str(parameters["rope_type"])}
    return {kind for one in parameters.values() for kind in _list_rope_types(one)}


def _list_unread(config: Any, found: Mapping[str, object]) -> set[str]:  # noqa: ANN401 - transformers has no types
    """Keys that the configuration's class does not have and whose names nowhere stand in the model's code."""
    kind = type(config)
    known = set(inspect.signature(kind).parameters) | {"model_type"}
    if dataclasses.is_dataclass(kind):
        known |= {field.name for field in dataclasses.fields(kind)}
    extra = {key for key in found if key not in known}
    file = Path(inspect.getfile(kind))
    code = file.with_name(file.name.replace("configuration_", "modeling_"))
    if not extra or not code.is_file():
        return set()
    import transformers

    root = Path(transformers.__file__).parent
    text = "\n".join(one.read_text(encoding="utf-8") for one in (file, code, *(root / name for name in _SHARED)))
    return {key for key in extra if not re.search(rf"\b{re.escape(key)}\b", text)}


def flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten nested tables into one, with keys joined by dots."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten({str(name): one for name, one in value.items()}, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
