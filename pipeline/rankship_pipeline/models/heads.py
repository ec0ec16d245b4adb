"""One backbone for several tasks, each with a head of its own: how models are taken apart and put together.

Inside the pipeline a task's number is one more input, the last: Grams, curvature, divergence, batch-norm and accuracy
then hold for pooled samples of all tasks as they do for one task's. What is exported knows no such input: it is the
backbone, and each head beside it.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError, MergeMismatch
from rankship_pipeline.models.data import Data, Inputs
from rankship_pipeline.models.weights import State

# The logit of another task's class: e to it is 0 in float32, and so is the class's share in every loss and divergence.
SHUT = -1e4
HEADS = "heads.*"  # the layers of heads, which stay dense: a task's last few parameters
_TOLERANCE = 1e-5  # of the largest output, in float32


class Headed(nn.Module):
    """A backbone and the heads of some of its tasks, by the tasks' numbers; `classes` counts every task's."""

    def __init__(self, backbone: nn.Module, heads: Mapping[int, nn.Module], classes: Sequence[int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({str(task): head for task, head in heads.items()})
        self.classes = tuple(classes)
        if hasattr(backbone, "inputs"):
            names: tuple[str, ...] = backbone.inputs  # type: ignore[assignment]  # as huggingface.LogitsOnly has it
            self.inputs = (*names, "task")  # find_mask looks for the attention mask by its name

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map the backbone's inputs and the tasks' numbers (batch,) to logits (batch, classes of all tasks).

        A sample's logits of tasks that are not its own, or whose head is not here, are SHUT.
        """
        *given, tasks = inputs
        features = self.backbone(*given)
        columns = []
        for task, classes in enumerate(self.classes):
            shut = features.new_full((len(features), classes), SHUT)
            if str(task) in self.heads:
                columns.append(torch.where((tasks == task)[:, None], self.heads[str(task)](features), shut))
            else:
                columns.append(shut)
        return torch.cat(columns, 1)


def open_logits(logits: Tensor) -> Tensor:
    """Which logits are some class's of the sample's own task, as booleans; all of a model without heads."""
    return logits > SHUT / 2


def take_apart(model: nn.Module, head: str, inputs: Inputs, *, name: str) -> tuple[nn.Module, nn.Module, int]:
    """The model without its head, the head, and how many classes that has; proven on the first two of `inputs`.

    InputError where no module is called `head`; MergeMismatch where its output is not what the model returns.
    """
    if head not in dict(model.named_modules()) or not head:
        last = [one for one, module in model.named_modules() if isinstance(module, nn.Linear)][-3:]
        raise InputError(
            f"merge.head: model {name!r} has no module {head!r}",
            hint=f"name the module that gives the logits; its last linear layers are {', '.join(last) or 'none'}",
        )
    sample = tuple(tensor[:2] for tensor in inputs)
    backbone = copy.deepcopy(model)
    taken = backbone.get_submodule(head)
    parent, _, child = head.rpartition(".")
    setattr(backbone.get_submodule(parent), child, nn.Identity())
    with torch.inference_mode():
        whole = model(*sample)
        try:
            parts = taken(backbone(*sample))
        except (RuntimeError, TypeError, AttributeError):
            parts = None
    if not isinstance(parts, Tensor) or parts.ndim != 2 or not _are_close(parts, whole):  # noqa: PLR2004
        raise MergeMismatch(
            f"merge.head = {head!r}: model {name!r} does not return that module's output (batch, classes), or computes"
            " it from more than one tensor",
            hint="name the last module, the one that maps features to logits",
        )
    return backbone, taken, parts.shape[1]


def _are_close(parts: Tensor, whole: Tensor) -> bool:
    return parts.shape == whole.shape and bool((parts - whole).abs().max() <= _TOLERANCE * whole.abs().max())


def join(models: Mapping[str, nn.Module], head: str, inputs: Inputs) -> Headed:
    """The backbone of the first model with the heads of all, tasks numbered in the models' order.

    Weights of other backbones are not looked at, but their modules must be the first's: else MergeMismatch.
    """
    parts = {name: take_apart(model, head, inputs, name=name) for name, model in models.items()}
    first, *others = parts
    for other in others:
        if repr(parts[other][0]) != repr(parts[first][0]):
            raise MergeMismatch(
                f"without their heads, models {other!r} and {first!r} are not built of the same modules",
                hint="give all factories one backbone: same layers, same settings",
            )
    heads = {task: one for task, (_, one, _) in enumerate(parts.values())}
    return Headed(parts[first][0], heads, [classes for _, _, classes in parts.values()]).eval()


def specialise(model: nn.Module, head: str, joined: Headed, task: int | None, inputs: Inputs, *, name: str) -> Headed:
    """One task's model in the form of `joined`: its own backbone and head; a base (`task` None) has no head."""
    backbone, taken, _ = take_apart(model, head, inputs, name=name)
    return Headed(backbone, {} if task is None else {task: taken}, joined.classes).eval()


def separate(states: Sequence[State]) -> tuple[list[State], State]:
    """What all states have, state by state, and what is some state's own: the tasks' heads."""
    shared = set(states[0]).intersection(*states[1:])
    own = {name: value for state in states for name, value in state.items() if name not in shared}
    return [{name: value for name, value in state.items() if name in shared} for state in states], own


def mark_tasks(data: Data, joined: Headed) -> Data:
    """The data as `joined` takes it: task numbers as the last input, labels counted through all tasks' classes.

    InputError where a task's labels are not classes of its head.
    """
    names = tuple(data.calibration)
    offsets = dict(zip(names, _add_up(joined.classes), strict=True))
    for name, classes in zip(names, joined.classes, strict=True):
        labels = data.tests[name][1]
        if labels.ndim != 1 or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise InputError(
                f"test labels of {name!r} run from {int(labels.min())} to {int(labels.max())}, its head has {classes}"
                " classes",
                hint="give every task's labels from 0, one per test input",
            )

    def mark(name: str, inputs: Inputs) -> Inputs:
        return (*inputs, torch.full((len(inputs[0]),), names.index(name)))

    tests = {name: (mark(name, data.tests[name][0]), data.tests[name][1] + offsets[name]) for name in names}
    marked = replace(
        data,
        calibration={name: mark(name, inputs) for name, inputs in data.calibration.items()},
        unlabelled={name: mark(name, inputs) for name, inputs in data.unlabelled.items()},
        tests=tests,
        tasks=names,
    )
    inputs, labels = marked.pool_tests()
    return replace(marked, test_inputs=inputs, test_labels=labels)


def _add_up(counts: Iterable[int]) -> list[int]:
    """How many come before each."""
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums[:-1]
