"""Each block of the student learns the dense block's outputs, on the inputs that the blocks before it now give.

A transformer is a list of blocks that all map hidden states to hidden states. One block alone is trained in a fraction
of the whole network's time and memory, and corrects what the blocks before it have left wrong. Parts outside the
list, embeddings and heads, stay as they are.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import fit_batch, split, thin
from rankship_pipeline.evaluate.masks import find_masks, pick_mask
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.decoder import Call
from rankship_pipeline.models.watch import Ended, watch, watch_calls
from rankship_pipeline.recover.refine.course import Course
from rankship_pipeline.recover.refine.teach import products

_NUMBERS = 2**19  # hidden numbers of a batch: enough for full products, few enough for many steps
HIDDEN_BYTES = 2**31  # of both models' hidden states on all samples
_LEAST = 1e-12
_TOKENS = 3  # dimensions of hidden states (samples, positions, width)


def learn_blocks(course: Course, teachers: Sequence[tuple[nn.Module, Inputs]]) -> None:
    """Train one block after the other, each for an equal share of the course and through a cycle of its own.

    The loss is the squared error of the block's output over the square of the dense one's, position by position
    (of other data sample by sample): a few tokens whose hidden states are a thousand times as large weigh no more.
    Masked positions do not count. Of more samples than HIDDEN_BYTES hold some are left out, evenly spread.
    """
    training = course.training
    names = find_blocks(training.student, teachers[0][1])
    passages = _start(training.student, names, teachers)
    for index, name in enumerate(names):
        block, begin, end = training.student.get_submodule(name), index / len(names), (index + 1) / len(names)
        for one in passages:
            one.advance_teacher(index, name)
        while index >= training.block and (share := course.look()) < end:
            training.block = index
            picked = int(torch.randint(len(passages), (), generator=training.generator))
            course.step(passages[picked].measure(block, index), max(0.0, share - begin) / (end - begin))
        if index >= training.block:
            training.optimizer.state.clear()  # the moments of one block alone are kept
            training.optimizer.zero_grad()
        for one in passages:
            one.advance(block, index)


@torch.inference_mode()
def find_blocks(model: nn.Module, inputs: Inputs) -> list[str]:
    """The names of a network's blocks: the longest list of modules of one class, each called with what the last gave.

    [] where there is no such list of at least two.
    """
    lists = [
        [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(child) for child in module.children()}) == 1
    ]
    names = [name for one in lists for name in one]
    taken: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def see_call(name: str, args: tuple[object, ...], _named: object) -> None:
        calls[name] += 1
        if args and isinstance(args[0], Tensor):
            taken[name] = args[0]

    def see(name: str, _x: Tensor, y: Tensor) -> None:
        given[name] = y

    with watch_calls(model, names, see_call), watch(model, names, see):
        model(*(tensor[:1] for tensor in inputs))

    def is_chain(one: list[str]) -> bool:
        return all(calls[name] == 1 and name in taken for name in one) and all(
            given[before] is taken[after] and taken[before].shape == taken[after].shape
            for before, after in pairwise(one)
        )

    return max((one for one in lists if len(one) > 1 and is_chain(one)), key=len, default=[])


@dataclass
class _Passage:
    """A batch on its way through a teacher's blocks and the student's: the hidden states that both have reached."""

    teacher: nn.Module
    hidden: Tensor  # the student's, before the current block
    wanted: Tensor  # the teacher's; behind the current block once it has advanced
    calls: list[Call]  # every block's other arguments
    teacher_calls: list[Call]
    counted: Tensor | None  # the positions that are not masked

    @torch.no_grad()
    def advance_teacher(self, index: int, name: str) -> None:
        self.wanted = self.teacher_calls[index].run(self.teacher.get_submodule(name), self.wanted)

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        self.hidden = self.calls[index].run(block, self.hidden)

    def measure(self, block: nn.Module, index: int) -> Tensor:
        """The relative squared error of the block's output, a mean over positions."""
        with products():
            found = self.calls[index].run(block, self.hidden)
        over = (-1,) if self.wanted.ndim == _TOKENS else tuple(range(1, self.wanted.ndim))
        errors = (found.float() - self.wanted).square().sum(over)
        relative = errors / self.wanted.square().sum(over).clamp_min(_LEAST)
        return relative.mean() if self.counted is None else relative[self.counted].mean()


def _start(student: nn.Module, names: list[str], teachers: Sequence[tuple[nn.Module, Inputs]]) -> list[_Passage]:
    """Every teacher's inputs in batches, before the first block of both models."""
    passages = []
    for teacher, inputs in teachers:
        one, _ = _reach(teacher, names, tuple(tensor[:1] for tensor in inputs))
        few = thin(inputs, max(1, HIDDEN_BYTES // (2 * one.nbytes * len(teachers))))
        for batch in split(few, fit_batch(one.numel(), _NUMBERS)):
            hidden, calls = _reach(student, names, batch)
            wanted, teacher_calls = _reach(teacher, names, batch)
            counted = pick_mask(find_masks(student, batch), hidden.shape)
            passages.append(_Passage(teacher, hidden, wanted, calls, teacher_calls, counted))
    return passages


@torch.no_grad()
def _reach(model: nn.Module, names: list[str], batch: Inputs) -> tuple[Tensor, list[Call]]:
    """The hidden states before the first block, and every block's other arguments."""
    first: list[Tensor] = []
    calls: list[Call] = []

    def see(_name: str, args: tuple[Tensor, ...], named: Mapping[str, object]) -> None:
        first.append(args[0])
        calls.append(Call(args[1:], named))
        if len(calls) == len(names):
            raise Ended

    with watch_calls(model, names, see), suppress(Ended):
        model(*batch)
    return first[0], calls
