"""One backbone for several tasks, each with its own head: splits models into backbone and head, and joins them.

In the pipeline the task number is an additional last input, so that Grams, curvature, divergence, batch-norm and
accuracy work on pooled samples of all tasks as on those of one task. Exported files do not have this input: they are
the backbone and each head.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError, MergeMismatch
from rankship_pipeline.models.data import Data, Inputs
from rankship_pipeline.models.weights import State

# The logit of another task's class: its exponential is 0 in float32, so the class adds nothing to any loss.
SHUT = -1e4
HEADS = "heads.*"  # the layers of heads, which stay dense: a task's last few parameters
_TOLERANCE = 1e-5  # of the largest output, in float32


class Headed(nn.Module):
    """A backbone and the heads of some of its tasks, by task number; `classes` has every task's number of classes."""

    def __init__(self, backbone: nn.Module, heads: Mapping[int, nn.Module], classes: Sequence[int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({str(task): head for task, head in heads.items()})
        self.classes = tuple(classes)
        if hasattr(backbone, "inputs"):
            names: tuple[str, ...] = backbone.inputs  # type: ignore[assignment]  # as huggingface.ByPosition has it
            self.inputs = (*names, "task")  # find_mask finds the attention mask by its name

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map the backbone's inputs and the task numbers (batch,) to logits (batch, classes of all tasks).

        The logits of other tasks, and of tasks without a head here, are SHUT.
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
    """A boolean mask of the logits of each sample's own task; all true for a model without heads."""
    return logits > SHUT / 2


def take_apart(model: nn.Module, head: str, inputs: Inputs, *, name: str) -> tuple[nn.Module, nn.Module, int]:
    """The model without its head, the head, and its number of classes; checked on the first two of `inputs`.

    InputError if no module has the name `head`; MergeMismatch if its output is not the model's output.
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
            hint="name the last module, which maps features to logits",
        )
    return backbone, taken, parts.shape[1]


def _are_close(parts: Tensor, whole: Tensor) -> bool:
    return parts.shape == whole.shape and bool((parts - whole).abs().max() <= _TOLERANCE * whole.abs().max())


def join(models: Mapping[str, nn.Module], head: str, inputs: Inputs) -> Headed:
    """The backbone of the first model with the heads of all, tasks numbered in the models' order.

    MergeMismatch unless all backbones have the same modules; the weights of the others are not used.
    """
    parts = {name: take_apart(model, head, inputs, name=name) for name, model in models.items()}
    first, *others = parts
    for other in others:
        if repr(parts[other][0]) != repr(parts[first][0]):
            raise MergeMismatch(
                f"without their heads, models {other!r} and {first!r} do not have the same modules",
                hint="use the same backbone in all factories: same layers, same settings",
            )
    heads = {task: one for task, (_, one, _) in enumerate(parts.values())}
    return Headed(parts[first][0], heads, [classes for _, _, classes in parts.values()]).eval()


def specialise(model: nn.Module, head: str, joined: Headed, task: int | None, inputs: Inputs, *, name: str) -> Headed:
    """One task's model in the form of `joined`: its own backbone and head, or no head for a base (`task` None)."""
    backbone, taken, _ = take_apart(model, head, inputs, name=name)
    return Headed(backbone, {} if task is None else {task: taken}, joined.classes).eval()


def separate(states: Sequence[State]) -> tuple[list[State], State]:
    """The tensors that all states have, per state, and the other tensors together: the tasks' heads."""
    shared = set(states[0]).intersection(*states[1:])
    own = {name: value for state in states for name, value in state.items() if name not in shared}
    return [{name: value for name, value in state.items() if name in shared} for state in states], own


def mark_tasks(data: Data, joined: Headed) -> Data:
    """The data for `joined`: task numbers as the last input, labels shifted by the classes of the tasks before.

    InputError if a task's labels are not classes of its head.
    """
    names = tuple(data.calibration)
    offsets = dict(zip(names, _add_up(joined.classes), strict=True))
    for name, classes in zip(names, joined.classes, strict=True):
        labels = data.tests[name][1]
        if labels.ndim != 1 or labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= classes:
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
    """The sum of the counts before each."""
    sums = [0]
    for count in counts:
        sums.append(sums[-1] + count)
    return sums[:-1]
