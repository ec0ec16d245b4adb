"""Runs a prepared model on some samples: whether it takes the data, what it answers, and how that is judged."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.judging import Judging, Known, decide_judging
from rankship_pipeline.evaluate.masks import find_masks
from rankship_pipeline.evaluate.quality import MEASURES, score, score_by_function
from rankship_pipeline.evaluate.remembered import Elsewhere, Remembered
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.quality import Measure, Score
from rankship_pipeline.models.data import Data, Inputs
from rankship_pipeline.models.heads import Headed
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.model_config import name_task
from rankship_pipeline.models.outputs import Outputs, call, flatten, list_dropped
from rankship_pipeline.models.recipe_imports import list_imported
from rankship_pipeline.models.source import load_function
from rankship_pipeline.models.token_table import find_token_table
from rankship_pipeline.recipe.choices import QualityChoice, Recipe

_POSITIONS = 3  # dimensions of (samples, positions, words)
_SAMPLES = 8  # that the model's outputs are looked at on


@dataclass(frozen=True)
class OwnScore:
    """A user's own score: its function, its name and direction, and the hash of the files that define it."""

    function: Callable[[object, Tensor], float]
    measure: Measure
    sha256: str


def load_own_score(choice: QualityChoice, folder: Path) -> OwnScore | None:
    """The function that quality.function names; None where it names none."""
    if choice.function is None:
        return None
    function = load_function(choice.function, folder)
    file, _, name = choice.function.partition(":")
    files = [folder / file, *list_imported([folder / file], folder)]
    measure = Measure(name=name.replace("_", " "), unit="", higher_is_better=not choice.lower_is_better, points=False)
    return OwnScore(function, measure, " ".join(hash_file(path) for path in files))


def find_judging(recipe: Recipe, model: nn.Module, data: Data) -> Judging:
    """Check that the model takes the data's samples, and decide how its outputs are judged; InputError if it cannot be.

    A named output is kept if it has one row for each sample; what else the model returns is left out, and said.
    """
    for name, inputs in data.calibration.items():
        _run(recipe, model, inputs, f"calibration of {name!r}", 2)
    given = _run(recipe, model, data.test_inputs, "test_inputs", _SAMPLES)
    count = min(_SAMPLES, len(data.test_inputs[0]))
    outputs = flatten(given)
    names = list(flatten(_run(recipe, model, data.test_inputs, "test_inputs", 1)))
    if list(outputs) != names:
        raise InputError(
            f"the model returns a {type(given).__name__} whose parts depend on the number of samples"
            f" ({', '.join(names) or 'nothing'} for one, {', '.join(outputs) or 'nothing'} for {count}), as a"
            " detector's boxes do: no file of fixed outputs can hold it",
            hint="wrap it in a module that returns its tensors before boxes are picked, one row for each sample",
        )
    kept = {name: one for name, one in outputs.items() if len(one) == count}
    first = recipe.models[0]
    known = Known(
        choice=recipe.quality,
        task=first.task or (name_task(type(model.model).__name__) if isinstance(model, ByPosition) else None),
        classes=_find_classes(model, first.labels),
        scores=_find_words(model, data.test_inputs, kept),
        bounded=_find_bounded(model, data.test_inputs, kept),
    )
    tested = next(iter(data.tests.values()), (data.test_inputs, None))
    tested = tested if data.test_labels is None else (data.test_inputs, data.test_labels)
    judging = decide_judging(known, kept, tested[1], tested[0])
    _check_class_names(recipe, model, kept, judging)
    dropped = [*list_dropped(given), *(f"{name} (not one row for each sample)" for name in outputs if name not in kept)]
    said = f"left out of the files: {', '.join(dropped)}" if dropped else ""
    return replace(judging, note="; ".join(filter(None, (judging.note, said))), bare=isinstance(given, Tensor))


def _run(recipe: Recipe, model: nn.Module, inputs: Inputs, what: str, samples: int) -> object:
    """What the model returns for the first samples; InputError where it does not take them."""
    try:
        with torch.inference_mode():
            return model(*(tensor[:samples] for tensor in inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as failure:
        raise InputError(
            f"the model does not take {what} of shape {[list(tensor.shape) for tensor in inputs]}: {failure}",
            hint=f"make {recipe.data.origin} return the inputs of the model's forward",
        ) from failure


@torch.inference_mode()
def _find_bounded(model: nn.Module, inputs: Inputs, outputs: Outputs) -> tuple[str, ...]:
    """The outputs between 0 and 1 here and with weights of 50 times the size, either sign: a sigmoid's, not by chance.

    The model may be untrained, and its numbers near zero.
    """
    names = [name for name, one in outputs.items() if one.is_floating_point() and _is_share(one)]
    for factor in (50.0, -50.0) if names else ():
        changed = copy.deepcopy(model)
        for parameter in changed.parameters():
            parameter.mul_(factor)
        found = call(changed, tuple(tensor[:_SAMPLES] for tensor in inputs))
        names = [name for name in names if _is_share(found[name])]
    return tuple(names)


def _is_share(output: Tensor) -> bool:
    return bool(((output >= 0) & (output <= 1)).all())


def name_inputs(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """The inputs' names in the model's own code, by which masks of padding are found; () where none is a mask."""
    named = getattr(model, "inputs", None)
    if named is None:  # an input that is only called "mask" hides nothing
        named = inspect.signature(model.forward).parameters if find_masks(model, inputs) else ()
    return tuple(named)


def _find_classes(model: nn.Module, labels: tuple[str, ...]) -> int | None:
    """The number of classes that a recipe or a model states; None where none does."""
    stated = getattr(model, "num_classes", None)
    return len(labels) or (stated if isinstance(stated, int) and stated > 1 else None)


def _find_words(model: nn.Module, inputs: Inputs, outputs: Outputs) -> tuple[str, ...]:
    """The outputs of a language model that score words: as many numbers for each token as its table has rows.

    Features have no more numbers than a row of the table, so that only more are scores.
    """
    lengths = {one.num_embeddings for one in model.modules() if isinstance(one, nn.Embedding)}
    wide = {name: one.shape[1:] for name, one in outputs.items() if one.ndim == _POSITIONS and one.shape[-1] in lengths}
    read = find_token_table(model, inputs) if wide else None
    if read is None or read[1].num_embeddings <= read[1].embedding_dim:
        return ()
    tokens, table = read
    return tuple(name for name, shape in wide.items() if shape == (tokens.shape[1], table.num_embeddings))


def _check_class_names(recipe: Recipe, model: nn.Module, outputs: Outputs, judging: Judging) -> None:
    """InputError where a model's `labels` name more or fewer classes than its output has."""
    if not judging.answer.is_choice and not any(source.labels for source in recipe.models):
        return
    classes = outputs[judging.judged[0]].shape[judging.answer.axis]
    counts = model.classes if isinstance(model, Headed) else [classes] * len(recipe.models)
    for source, count in zip(recipe.models, counts, strict=True):
        if source.labels and len(source.labels) != count:
            raise InputError(
                f"model {source.name!r} has {count} classes, its `labels` name {len(source.labels)}",
                hint="name every class once, in the order of the model's outputs",
            )


@dataclass(frozen=True)
class Court:
    """Scores models of one recipe: by labels where there are some, else by the outputs of the dense model."""

    judging: Judging
    own: OwnScore | None = None

    @property
    def measure(self) -> Measure:
        """What its scores count."""
        return MEASURES[self.judging.kind] if self.own is None else self.own.measure

    @property
    def needs_reference(self) -> bool:
        """Whether the dense model's outputs stand for labels."""
        return self.own is None and not self.judging.labelled

    def score(self, model: nn.Module, inputs: Inputs, target: Tensor | Outputs | None, stage: str) -> Score:
        """A model's score on test inputs."""
        if self.own is not None:
            labels = target if isinstance(target, Tensor) else None
            return score_by_function(self.own.function, self.own.measure, model, inputs, labels, stage)
        if target is None:
            message = "a score needs labels or the dense model's outputs"
            raise TypeError(message)
        return score(model, inputs, target, self.judging, stage)

    def score_outputs(
        self, outputs: Outputs, names: tuple[str, ...], inputs: Inputs, target: Tensor, stage: str
    ) -> Score:
        """The score of outputs that were computed elsewhere from these inputs, which the model's code calls `names`."""
        return self.score(Remembered(Elsewhere(names), inputs, outputs), inputs, target, stage)
