"""Loads data without the user's code: a folder of images, a file of texts, or a table; OPENERS lists the readers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.class_names import number_classes
from rankship_pipeline.models.csv_file import open_table
from rankship_pipeline.models.image_folder import open_images
from rankship_pipeline.models.model_config import read_class_names
from rankship_pipeline.models.opened import OpenedSource
from rankship_pipeline.models.outputs import call
from rankship_pipeline.models.running_text import open_running_text
from rankship_pipeline.models.samples import Samples, split
from rankship_pipeline.models.text_file import open_texts
from rankship_pipeline.models.weights import load_into
from rankship_pipeline.recipe.choices import DataKind, Recipe, Source

Opener = Callable[[Recipe, Path], Samples]
Mender = Callable[[nn.Module, tuple[Tensor, ...]], nn.Module]  # brings the first model to the form that is built
_BATCH = 64
_CLASSIFIERS = ("sequence-classification", "image-classification")
_IGNORED = -100  # the label of a position that does not count


def _open_text(recipe: Recipe, folder: Path) -> Samples:
    """Open one running text for a model that goes on with texts, single texts for any other model."""
    return (open_running_text if recipe.models[0].task == "causal-lm" else open_texts)(recipe, folder)


def _open_csv(recipe: Recipe, folder: Path) -> Samples:
    """Open texts for a model that reads text, features for any other model."""
    return (_open_text if recipe.models[0].huggingface is not None else open_table)(recipe, folder)


OPENERS: dict[DataKind, Opener] = {"images": open_images, "text": _open_text, "csv": _open_csv}


def load_files(
    recipe: Recipe, folder: Path, sources: Mapping[str, OpenedSource], mend: Mender | None = None
) -> dict[str, object]:
    """Load the recipe's files in the form of a loader's result (see data.load_data); every model gets the same data.

    Without labels, the predictions of a single classifier before compressing are the labels: `answers` is then
    "predictions". A model of other numbers has no labels then.
    `mend` changes that model as the build does before these inputs reach it.
    """
    kind = next(iter(recipe.data.given))
    if kind == "images" and recipe.models[0].task not in {None, "image-classification"}:
        raise InputError(
            f"{recipe.data.origin}: model {recipe.models[0].name!r} is for {recipe.models[0].task} and takes no images",
            hint="give a model for image-classification, or other data",
        )
    samples = OPENERS[kind](recipe, folder)
    calibration, tests = split(samples.count, recipe.data, recipe.seed, samples.most)
    inputs, test_inputs = samples.read(calibration), samples.read(tests)
    labels: Tensor | None
    if samples.read_labels is not None:
        labels, answers = samples.read_labels(tests), ""
    elif samples.labels is None and not _classifies(recipe, sources, test_inputs):
        labels, answers = _list_next_tokens(recipe.models[0], test_inputs), ""
    elif samples.labels is None:
        labels, answers = _predict(recipe, sources, test_inputs, mend), "predictions"
    else:
        chosen = [samples.labels[index] for index in tests]
        numbers = _read_numbers(samples.labels, recipe, sources, test_inputs)
        labels = _number(chosen, samples, recipe, sources, test_inputs) if numbers is None else numbers[tests]
        answers = ""
    return {
        "calibration": {source.name: inputs for source in recipe.models},
        "test_inputs": test_inputs,
        "test_labels": labels,
        "answers": answers or "labels",
    }


def _classifies(recipe: Recipe, sources: Mapping[str, OpenedSource], inputs: tuple[Tensor, ...]) -> bool:
    """Whether the first model's outputs are scores of classes: by [quality], its task, its class names, or pictures."""
    source, kind = recipe.models[0], recipe.quality.kind
    if kind is not None or recipe.quality.function is not None:
        return kind == "classification"
    if source.task is not None:
        return source.task in _CLASSIFIERS and _count_outputs(sources[source.name].untrained, inputs) != 1
    known = bool(source.labels) or recipe.data.images is not None
    return known and _count_outputs(sources[source.name].untrained, inputs) != 1


def _list_next_tokens(source: Source, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """The token after each position of a text, (samples, positions), where the model is to give it; else None."""
    if source.task != "text-generation" or "input_ids" not in source.inputs:
        return None
    tokens = inputs[source.inputs.index("input_ids")]
    if "attention_mask" in source.inputs:
        tokens = tokens.masked_fill(inputs[source.inputs.index("attention_mask")] == 0, _IGNORED)
    return nn.functional.pad(tokens[:, 1:], (0, 1), value=_IGNORED)


def _read_numbers(
    found: Sequence[str], recipe: Recipe, sources: Mapping[str, OpenedSource], inputs: tuple[Tensor, ...]
) -> Tensor | None:
    """Labels that are numbers to predict, (samples,), not classes: for one output, or with a fraction; else None."""
    kind = recipe.quality.kind
    try:
        numbers = torch.tensor([float(one) for one in found])
    except ValueError:
        return None
    whole = bool((numbers == numbers.round()).all())
    single = _count_outputs(sources[recipe.models[0].name].untrained, inputs) == 1
    return numbers if kind == "regression" or (kind is None and (single or not whole)) else None


def _number(
    found: Sequence[str],
    samples: Samples,
    recipe: Recipe,
    sources: Mapping[str, OpenedSource],
    inputs: tuple[Tensor, ...],
) -> Tensor:
    """The class indices of the test samples; all class names in the data determine the order."""
    every = samples.labels or ()
    first = sources[recipe.models[0].name]
    names = read_class_names(first.source, first.folder)
    outputs = len(names) or _count_outputs(first.untrained, inputs)
    numbers = number_classes([*found, *every], names, outputs, where=recipe.data.origin)
    return numbers[: len(found)]


def _count_outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> int | None:
    """The model's number of classes; None if it does not take these inputs, which a later check reports."""
    try:
        with torch.inference_mode():
            outputs = call(model, tuple(tensor[:1] for tensor in inputs))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return next(iter(outputs.values())).shape[-1] if outputs else None


def _predict(
    recipe: Recipe, sources: Mapping[str, OpenedSource], inputs: tuple[Tensor, ...], mend: Mender | None
) -> Tensor:
    """The single model's predicted classes of the test inputs before compressing, (samples,)."""
    source, where = recipe.models[0], recipe.data.origin
    if len(recipe.models) > 1:
        raise InputError(
            f"{where} has no labels: the accuracy of a merge of {len(recipe.models)} models cannot be measured",
            hint="give every test sample its class: a subfolder each, label<TAB>text, or a column of labels",
        )
    if source.train is not None:
        raise InputError(
            f"{where} has no labels, and {source.name!r} is trained during the build: no predictions can replace them",
            hint="give the samples their classes; or train first, and name the `weights`",
        )
    opened = sources[source.name]
    model = load_into(opened.make(), opened.load_state(), where=source.name)
    if mend is not None:
        model = mend(model, inputs)
    starts = range(0, len(inputs[0]), _BATCH)
    try:
        with torch.inference_mode():
            batches = [call(model, tuple(one[start : start + _BATCH] for one in inputs)) for start in starts]
            answers = [next(iter(one.values())).argmax(-1) for one in batches]
    except (RuntimeError, TypeError, ValueError, IndexError) as failure:
        raise InputError(
            f"model {source.name!r} does not take {where} of shape {[list(one.shape) for one in inputs]}: {failure}",
            hint="see `size`, `channels`, `columns` and `tokens` in [data]",
        ) from failure
    return torch.cat(answers).clone()
