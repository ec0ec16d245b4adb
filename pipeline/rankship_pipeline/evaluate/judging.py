"""Decides what a model's answers are: the output that labels belong to, how it is judged, how outputs are distributed.

The recipe decides, then the model's own task, then what can be seen: the labels' type and values, the outputs' shapes.
Numbers are taken for classes' scores only on evidence; a single column never is one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rankship_pipeline.evaluate.accuracy import IGNORED
from rankship_pipeline.evaluate.likelihood import IMAGE, Answer
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quality import QualityKind
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import Outputs
from rankship_pipeline.recipe.choices import QualityChoice, Task

# a transformers model's task → what its answers are
KINDS: dict[Task, QualityKind] = {
    "sequence-classification": "classification",
    "image-classification": "classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "causal-lm": "language-model",
    "text-generation": "language-model",
    "fill-mask": "language-model",
    "text2text-generation": "language-model",
    "feature-extraction": "embedding",
    "semantic-segmentation": "dense-map",
}
_CHOICES: set[QualityKind] = {
    "classification",
    "token-classification",
    "question-answering",
    "dense-map",
    "language-model",
}
SPAN = ("start_logits", "end_logits")  # the outputs of a question-answering model
_EXACT = 1e-3  # of sums of probabilities and lengths of rows


@record
class Judging:
    """What a model answers, and how it is judged.

    `judged` names the outputs that are compared with labels, or with the dense model's outputs where `labelled` is
    false. `outputs` names all that are exported; `likelihood` says how those of floating-point numbers are distributed.
    `note` says what was decided against appearances, empty otherwise. `bare` says that the model returns one tensor.
    """

    kind: QualityKind
    judged: tuple[str, ...]
    outputs: tuple[str, ...]
    likelihood: dict[str, Answer]
    labelled: bool
    note: str = ""
    bare: bool = False

    @property
    def classes(self) -> dict[str, int]:
        """The axis of classes of every output that holds classes' scores."""
        return {
            name: answer.axis
            for name, answer in self.likelihood.items()
            if answer.family in {"logits", "probabilities"}
        }

    @property
    def answer(self) -> Answer:
        """How the first judged output is distributed."""
        return self.likelihood[self.judged[0]]


@record
class Known:
    """What is known besides the data: [quality], the model's task, its number of classes, its outputs' range.

    `bounded` names the outputs that lie between 0 and 1 whatever the weights, `scores` those that score words.
    """

    choice: QualityChoice = QualityChoice()
    task: Task | None = None
    classes: int | None = None
    bounded: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()


def decide_judging(known: Known, outputs: Outputs, labels: Tensor | None, inputs: Inputs) -> Judging:
    """Decide on some samples' `outputs` and all test `labels` and `inputs`; InputError where labels fit no output."""
    floats = {name: one for name, one in outputs.items() if one.is_floating_point()}
    if not floats:
        raise InputError(
            "the model returns no floating-point tensor with samples first",
            hint="wrap it in one that returns its logits, features or values",
        )
    seen = {
        name: Answer() if name in known.scores else see_answer(name, one, known.classes) for name, one in floats.items()
    }
    kind = known.choice.kind or _read_kind(known.task, floats, labels)
    if kind == "question-answering" or (kind is None and set(SPAN) <= set(floats) and known.choice.output is None):
        judged = _pick_span(floats)
        likelihood = {**seen, **dict.fromkeys(judged, Answer())}
        fits = labels is not None and labels.ndim == 2 and labels.shape[1] == len(SPAN)  # noqa: PLR2004 - a span each
        if labels is not None and not fits:
            raise _refuse(labels, floats, "give (start, end) for each question: whole numbers (samples, 2)")
        settled: QualityKind = "question-answering" if fits else "fidelity"
        return _settle(settled, judged, outputs, likelihood, labelled=fits)
    found = None
    if labels is not None and kind != "fidelity" and known.choice.function is None:
        found = _match_labels(known, kind, floats, seen, labels, inputs)
    if found is not None:
        return _settle(found.kind, (found.name,), outputs, _spread(seen, floats, found), labelled=True)
    name = known.choice.output or next((one for one in floats if "logits" in one.lower()), next(iter(floats)))
    _check_named(name, floats)
    if known.choice.function is not None:
        return _settle("fidelity", (name,), outputs, seen, labelled=labels is not None)
    return _judge_unlabelled(name, kind, outputs, seen, labels)


def _read_kind(task: Task | None, floats: Outputs, labels: Tensor | None) -> QualityKind | None:
    """The kind of a transformers model's task; a text classifier of one column, or of numbers, is a regression."""
    kind = None if task is None else KINDS[task]
    first = next(iter(floats.values()))
    numbers = first.shape[-1] == 1 or (labels is not None and labels.is_floating_point())
    return None if kind == "classification" and numbers else kind


def _judge_unlabelled(
    name: str, kind: QualityKind | None, outputs: Outputs, seen: dict[str, Answer], labels: Tensor | None
) -> Judging:
    """By comparison with the dense model's outputs."""
    note = "the test labels say nothing of these outputs (all are the same): they are judged by their distance"
    if kind in _CHOICES and not seen[name].is_choice and outputs[name].shape[-1] > 1:
        axis = 1 if outputs[name].ndim >= IMAGE else -1
        seen = {**seen, name: Answer(axis=axis)}
    elif kind in {"regression", "embedding"}:
        seen = {**seen, name: Answer(family="values", axis=seen[name].axis)}
    rows = outputs[name]
    unit = not seen[name].is_choice and rows.ndim == 2 and rows.shape[1] > 1 and _is_unit(rows)  # noqa: PLR2004
    settled: QualityKind = "embedding" if kind == "embedding" or (kind is None and unit) else "fidelity"
    ignored = labels is not None and kind != "fidelity"
    return _settle(settled, (name,), outputs, seen, labelled=False, note=f"{note} from the dense model's" * ignored)


def _settle(
    kind: QualityKind,
    judged: Sequence[str],
    outputs: Outputs,
    likelihood: dict[str, Answer],
    *,
    labelled: bool,
    note: str = "",
) -> Judging:
    return Judging(
        kind=kind,
        judged=tuple(judged),
        outputs=tuple(outputs),
        likelihood=likelihood,
        labelled=labelled,
        note=note,
    )


def see_answer(name: str, output: Tensor, classes: int | None = None) -> Answer:
    """What an output is by itself: probabilities, logits by its name or its known number of classes, else values."""
    axis = 1 if output.ndim >= IMAGE else -1
    if output.ndim < 2 or output.shape[axis] < 2:  # noqa: PLR2004 - one column is no choice
        return Answer(family="values", axis=axis)
    for one in dict.fromkeys((axis, -1)):
        if _sums_to_one(output, one):
            return Answer(family="probabilities", axis=one)
        if bool((output <= 0).all()) and _sums_to_one(output.exp(), one):
            return Answer(axis=one)
    if "logits" in name.lower() or output.shape[axis] == classes:
        return Answer(axis=axis)
    return Answer(family="values", axis=axis)


def _sums_to_one(output: Tensor, axis: int) -> bool:
    whole = output.double()
    return bool((whole >= 0).all()) and bool(((whole.sum(axis) - 1).abs() < _EXACT).all())


def _is_unit(rows: Tensor) -> bool:
    return bool(((rows.double().norm(dim=-1) - 1).abs() < _EXACT).all())


@record
class _Match:
    name: str
    kind: QualityKind
    answer: Answer


def _match_labels(
    known: Known,
    kind: QualityKind | None,
    floats: Outputs,
    seen: dict[str, Answer],
    labels: Tensor,
    inputs: Inputs,
) -> _Match | None:
    """The output that the labels belong to; None where they say nothing, InputError where they fit none."""
    wanted = known.choice.output
    if wanted is not None:
        _check_named(wanted, floats)
    silent = False
    for name in [wanted] if wanted is not None else sorted(floats, key=lambda one: "logits" not in one.lower()):
        output = floats[name]
        if kind not in {"regression", "embedding"} and not labels.is_floating_point():
            axis = _find_axis(output, labels)
            if axis is not None and (kind in _CHOICES or not _says_nothing(output, labels)):
                answer = seen[name] if seen[name].is_choice and seen[name].axis == axis else Answer(axis=axis)
                return _Match(name=name, kind=kind or _name_kind(output, labels, inputs), answer=answer)
            silent |= axis is not None
        if _count(output.shape) == _count(labels.shape):
            found = _match_numbers(known, kind, name, output, labels)
            if found is not None:
                return found
            silent = True
    if silent:
        return None
    raise _refuse(labels, floats, "give labels of an output's shape, or classes of it; or none (test_labels = None)")


def _match_numbers(known: Known, kind: QualityKind | None, name: str, output: Tensor, labels: Tensor) -> _Match | None:
    """What labels of an output's own shape mean: yes or no, vectors, or numbers; None where they say nothing."""
    if kind in {None, *_CHOICES} and _is_binary(labels):
        answer = Answer(family="binary probabilities" if name in known.bounded else "binary logits")
        asked: QualityKind = "dense-map" if output.ndim >= IMAGE else "classification"
        return _Match(name=name, kind=kind or asked, answer=answer)
    if kind in _CHOICES:
        return None
    if bool((labels == labels[:1]).all()):
        if kind == "regression":
            raise InputError(
                "quality.kind is regression, and all test labels are the same: their spread is no measure of errors",
                hint='give labels that differ; or quality = "fidelity", which needs none',
            )
        return None
    values = Answer(family="values", axis=1 if output.ndim >= IMAGE else -1)
    vectors = output.ndim == 2 and output.shape[1] > 1  # noqa: PLR2004 - (samples, numbers)
    unit = vectors and _is_unit(output) and _is_unit(labels)
    return _Match(name=name, kind=kind or ("embedding" if unit else "regression"), answer=values)


def _spread(seen: dict[str, Answer], floats: Outputs, found: _Match) -> dict[str, Answer]:
    """The likelihood, once one output is known: others of its shape (an auxiliary head) are alike."""
    shape = floats[found.name].shape
    alike = {name: found.answer for name, one in floats.items() if one.shape == shape}
    return {**seen, **(alike if found.answer.family == "logits" else {}), found.name: found.answer}


def _find_axis(output: Tensor, labels: Tensor) -> int | None:
    """The axis of the classes that the labels index, the last or that of channels; None where there is none."""
    counted = labels[labels != IGNORED]
    low, high = (int(counted.min()), int(counted.max())) if len(counted) else (-1, -1)
    axes = (1, -1) if output.ndim >= IMAGE else (-1, 1)
    for axis in axes:
        if output.ndim <= 1 or output.ndim != labels.ndim + 1 or output.shape[axis] < 2:  # noqa: PLR2004 - classes
            continue
        rest = [side for place, side in enumerate(output.shape) if place != axis % output.ndim]
        if rest[1:] == list(labels.shape[1:]):
            if low < 0 or high >= output.shape[axis]:
                raise InputError(
                    f"test_labels run from {low} to {high}, the model has {output.shape[axis]} classes",
                    hint="correct the labels",
                )
            return axis
    return None


def _says_nothing(output: Tensor, labels: Tensor) -> bool:
    """Whether labels of a single class stand beside rows of length one, which are embeddings."""
    return output.ndim == 2 and _is_unit(output) and bool(labels.min() == labels.max())  # noqa: PLR2004 - (samples, numbers)


def _name_kind(output: Tensor, labels: Tensor, inputs: Inputs) -> QualityKind:
    if output.ndim == 2:  # noqa: PLR2004 - (samples, classes)
        return "classification"
    if output.ndim >= IMAGE:
        return "dense-map"
    return "language-model" if _are_next_tokens(labels, inputs) else "token-classification"


def _are_next_tokens(labels: Tensor, inputs: Inputs) -> bool:
    """Whether every label that counts is the token after its position, in one of the inputs."""
    for tokens in inputs:
        if tokens.is_floating_point() or tokens.ndim != 2 or tokens.shape[1] < 2:  # noqa: PLR2004 - (samples, tokens)
            continue
        length = min(labels.shape[1], tokens.shape[1] - 1)
        wanted, following = labels[:, :length], tokens[:, 1 : length + 1]
        counted = wanted != IGNORED
        if bool(counted.any()) and torch.equal(wanted[counted], following[counted].to(wanted.dtype)):
            return True
    return False


def _is_binary(labels: Tensor) -> bool:
    """Whether all that count are 0 or 1, and both occur."""
    counted = labels[labels != IGNORED]
    return len(counted) > 0 and bool(((counted == 0) | (counted == 1)).all()) and bool(counted.min() != counted.max())


def _count(shape: Sequence[int]) -> list[int]:
    """A sample's sides without those of one: (samples, 1) is (samples,), one channel is none."""
    return [side for side in shape[1:] if side != 1]


def _pick_span(floats: Outputs) -> tuple[str, ...]:
    """The two outputs that give a span's begin and end; or the first output, (samples, positions, 2)."""
    if set(SPAN) <= set(floats):
        return SPAN
    pairs = [name for name, one in floats.items() if one.ndim == 2]  # noqa: PLR2004 - (samples, positions)
    if len(pairs) < len(SPAN):
        raise InputError(
            f"question answering needs two outputs (samples, positions), the model gives {_list_shapes(floats)}",
            hint="return the scores of the answer's first and last token as two outputs",
        )
    return tuple(pairs[:2])


def _check_named(name: str, floats: Outputs) -> None:
    if name not in floats:
        raise InputError(
            f"quality.output names {name!r}, the model gives {_list_shapes(floats)}", hint="name one of these"
        )


def _list_shapes(floats: Outputs) -> str:
    return ", ".join(f"{name} of shape {list(one.shape)}" for name, one in floats.items())


def _refuse(labels: Tensor, floats: Outputs, hint: str) -> InputError:
    return InputError(
        f"test_labels are {labels.dtype} of shape {list(labels.shape)} and fit no output of the model:"
        f" it gives {_list_shapes(floats)}",
        hint=hint,
    )
