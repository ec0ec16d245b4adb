"""Label-free refinement: trains a compressed model for a stated amount to compute what the dense models compute.

by_outputs.py compares outputs, by_blocks.py those of each block of a transformer. course.py takes the steps, draw.py
draws each step's samples, teach.py gives the loss of outputs, schedule.py the step size, units.py its units;
through.py rounds as it learns; save.py saves an unfinished run.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankship_pipeline.evaluate.likelihood import Likelihood
from rankship_pipeline.foundation.records import Refinement
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.quantise.grid import Grid
from rankship_pipeline.recipe.choices import RefineChoice
from rankship_pipeline.recover.refine.by_blocks import learn_blocks
from rankship_pipeline.recover.refine.by_outputs import learn_outputs
from rankship_pipeline.recover.refine.course import Course, Saving
from rankship_pipeline.recover.refine.save import Training
from rankship_pipeline.recover.refine.through import begin_rounding, end_rounding

__all__ = ["Saving", "refine"]


def refine(  # noqa: PLR0913 - what a refinement depends on
    student: nn.Module,
    teachers: Sequence[tuple[nn.Module, Inputs]],
    choice: RefineChoice,
    seed: int,
    *,
    clock: Callable[[], float] = time.process_time,
    saving: Saving | None = None,
    on_progress: Callable[[float], None] = lambda _share: None,
    likelihood: Likelihood | None = None,
    grids: Mapping[str, Grid] = MappingProxyType({}),
) -> tuple[nn.Module, Refinement]:
    """Train a copy of the student towards each teacher on that teacher's inputs; returns it and what it took.

    By outputs, every batch holds equally many samples of each teacher, so that batch-norm gets them mixed, as in use.
    The loss is the squared error of the outputs (of a sample's own task, see heads.py) over their variance, of numbers
    that are no logits column by column (`likelihood`; None: all are logits), so that no scale weighs more. By blocks
    see by_blocks.py. Adam runs a one-cycle schedule over the choice's `steps`, or over processor seconds (other work
    may share the machine): a slower machine then takes fewer steps and still completes the cycle. The factors must be
    balanced (decompose.balance). By outputs batch-norm statistics follow the data; dropout stays off. No labels are
    read. `steps` give the same bytes on every run, interrupted or not. `on_progress` gets the share done before each
    step. Operators with `grids` learn through the rounding (through.py), and the result's weights are on them.
    BuildError if the loss is no longer finite.
    """
    course = Course(_begin(student, choice, seed, grids), choice, clock, saving, on_progress)
    if choice.by == "blocks":
        learn_blocks(course, teachers)
    else:
        learn_outputs(course, teachers, likelihood)
    refined, steps = course.training.student, course.training.steps
    end_rounding(refined)
    taken = Refinement(steps=steps, cpu_seconds=course.cpu_seconds, augment=choice.augment, by=choice.by)
    return refined.eval(), taken


def _begin(student: nn.Module, choice: RefineChoice, seed: int, grids: Mapping[str, Grid]) -> Training:
    """A new training on a copy of the student, whose batch-norms follow the data where whole outputs are learned."""
    student = copy.deepcopy(student).eval()
    for module in student.modules():
        if isinstance(module, _BatchNorm) and choice.by == "outputs":
            module.train()
    begin_rounding(student, grids)
    optimizer = torch.optim.Adam(student.parameters(), lr=choice.step_size)
    return Training(student, optimizer, torch.Generator().manual_seed(seed))
