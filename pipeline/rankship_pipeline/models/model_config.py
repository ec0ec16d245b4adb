"""What a Hugging Face model's own files say of it: its task, inputs, classes, tokenizer and image processor."""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.huggingface import find_snapshot, resolve_config
from rankship_pipeline.recipe.choices import Recipe, Source, Task
from rankship_pipeline.recipe.normalisation import Normalisation

# what the name of a transformers class holds → its task
_TASKS: dict[str, Task] = {
    "ForSequenceClassification": "sequence-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForSemanticSegmentation": "semantic-segmentation",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "text2text-generation",
}
_FEATURES = "Model"  # how the name of a class ends that gives features
_IMAGE_TASKS = ("image-classification", "semantic-segmentation")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer_config.json", "*.model")
_IMAGE_FILE = "preprocessor_config.json"
_PIXELS = 255  # the largest value of a pixel that was not rescaled
_UNNAMED = re.compile(r"LABEL_\d+")


def complete_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with what it leaves to its models' own files: tasks, inputs, and what a folder's images go through."""
    is_loaded = recipe.data.loader is not None
    models = tuple(complete_source(source, folder, is_loaded=is_loaded) for source in recipe.models)
    base = recipe.merge.base
    if base is not None:
        base = complete_source(base, folder, is_loaded=is_loaded)
    merge = replace(recipe.merge, base=base)
    data, first = recipe.data, models[0]
    if data.images is not None and data.normalise is None:
        data = replace(data, normalise=first.normalise or _find_normalisation(first, folder))
    return replace(recipe, models=models, merge=merge, data=data)


def complete_source(source: Source, folder: Path, *, is_loaded: bool = False) -> Source:
    """A Hugging Face model with its task and the names of its inputs, as given or as its files say.

    Data that a loader gives (`is_loaded`) may be padded: a language model is then one of whole texts.
    """
    if source.huggingface is None or (source.task is not None and source.inputs):
        return source
    task = source.task or read_task(source, folder)
    if task == "causal-lm" and source.task is None and is_loaded:
        task = "text-generation"
    return replace(source, task=task, inputs=source.inputs or _read_inputs(source, task, folder))


def read_config(source: Source, folder: Path) -> dict[str, Any]:
    """A model's config.json as it is written."""
    return read_json(find_snapshot(source, folder) / "config.json")


def read_context(source: Source, folder: Path) -> int | None:
    """The most tokens that a model takes at once; None where its configuration does not say."""
    found = getattr(resolve_config(find_snapshot(source, folder)).get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def read_vocabulary(source: Source, folder: Path) -> int:
    """The number of tokens that a model knows."""
    return int(resolve_config(find_snapshot(source, folder)).get_text_config().vocab_size)


def read_task(source: Source, folder: Path) -> Task:
    """What a model was trained for, by the name of its class; InputError where Rankship has no such task."""
    names = [str(name) for name in read_config(source, folder).get("architectures") or []]
    for name in names:
        task = name_task(name)
        if task is not None:
            return task
    known = ", ".join(get_args(Task))
    raise InputError(
        f"model {source.name!r}: {source.huggingface} is "
        + (f"a {' and '.join(names)}" if names else "of no class that its config.json names (`architectures`)")
        + f"; Rankship takes models for {known}",
        hint="give a model fine-tuned for one of these; where it is one all the same, state `task` in [[models]]",
    )


def name_task(name: str) -> Task | None:
    """What the models of a transformers class answer, by the class's name; None where it has no such task."""
    found = next((task for part, task in _TASKS.items() if part in name), None)
    return "feature-extraction" if found is None and name.endswith(_FEATURES) else found


def _read_inputs(source: Source, task: Task, folder: Path) -> tuple[str, ...]:
    """The forward arguments: pixels, or what the model's tokenizer makes and its class takes."""
    if task in _IMAGE_TASKS:
        return ("pixel_values",)
    if task == "causal-lm":  # windows of running text have no padding
        return ("input_ids",)
    named = tuple(load_tokenizer(source, folder).model_input_names)
    import transformers

    for name in read_config(source, folder).get("architectures") or []:
        found = getattr(transformers, str(name), None)
        if found is not None:
            taken = inspect.signature(found.forward).parameters
            return tuple(one for one in named if one in taken)
    return named


def load_tokenizer(source: Source, folder: Path) -> Any:  # noqa: ANN401 - transformers has no types
    """The tokenizer that lies beside the model."""
    snapshot = find_snapshot(source, folder)
    missing = InputError(
        f"model {source.name!r}: {source.huggingface} comes without a tokenizer that can be read",
        hint="save the tokenizer into the model's folder; or state `inputs` in [[models]] and give a loader in [data]",
    )
    if not any(list(snapshot.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise missing
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(snapshot, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as failure:
        raise missing from failure


def load_image_processor(source: Source, folder: Path) -> Any | None:  # noqa: ANN401 - transformers has no types
    """The model's own preparation of images, by pillow; None where its folder has no preprocessor_config.json."""
    if source.huggingface is None or not (find_snapshot(source, folder) / _IMAGE_FILE).is_file():
        return None
    import transformers

    snapshot = find_snapshot(source, folder)
    processors: Any = transformers.AutoImageProcessor
    try:
        return processors.from_pretrained(snapshot, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as failure:
        raise InputError(
            f"model {source.name!r}: {snapshot / _IMAGE_FILE} cannot be used: {failure}",
            hint="copy the model's folder again; or state `size` and `normalise` in [data]",
        ) from failure


def read_class_names(source: Source, folder: Path) -> tuple[str, ...]:
    """A model's class names in the order of its outputs: as the recipe states them or its files do; else empty."""
    if source.labels or source.huggingface is None:
        return source.labels
    named = read_config(source, folder).get("id2label") or {}
    labels = tuple(str(named[index]) for index in sorted(named, key=int))
    return () if all(_UNNAMED.fullmatch(one) for one in labels) else labels


def _find_normalisation(source: Source, folder: Path) -> Normalisation:
    """What the model's own image processor does; pixels in [0, 1] stay as they are where it has none."""
    processor = load_image_processor(source, folder)
    own = None if processor is None else read_normalisation(processor.to_dict())
    return own or Normalisation(mean=(0.0,), std=(1.0,))


def read_normalisation(images: Mapping[str, Any]) -> Normalisation | None:
    """A preprocessor_config.json's (pixel·factor − mean) / std, for pixels in [0, 1]; None where it has none."""
    mean, std = images.get("image_mean"), images.get("image_std")
    if not images.get("do_normalize", mean is not None):
        mean, std = (0.0, 1.0) if "do_normalize" in images else (None, None)
    if mean is None or std is None:
        return None
    mean, std = (value if isinstance(value, list | tuple) else [value] for value in (mean, std))
    scale = _PIXELS * (images.get("rescale_factor", 1 / _PIXELS) if images.get("do_rescale", True) else 1)
    return Normalisation(mean=tuple(one / scale for one in mean), std=tuple(one / scale for one in std))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's table; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as failure:
        raise InputError(f"{path} is not valid JSON: {failure}", hint="copy the model's folder again") from None
    return found if isinstance(found, dict) else {}
