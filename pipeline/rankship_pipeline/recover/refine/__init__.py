"""Label-free refinement: trains a compressed model for a stated amount to match the dense models' outputs.

draw.py draws each step's samples, teach.py gives the loss, schedule.py the step size, units.py its units; through.py
rounds as it learns; save.py saves an unfinished run.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankship_pipeline.evaluate.likelihood import Likelihood
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.records import Refinement
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.quantise.grid import Grid
from rankship_pipeline.recipe.choices import RefineChoice
from rankship_pipeline.recover.refine.draw import draw_batches
from rankship_pipeline.recover.refine.save import Training, keep, restore
from rankship_pipeline.recover.refine.schedule import find_step_size, measure_share
from rankship_pipeline.recover.refine.teach import measure_loss, measure_teacher
from rankship_pipeline.recover.refine.through import begin_rounding, end_rounding
from rankship_pipeline.recover.refine.units import list_units, stepping


@dataclass(frozen=True)
class Saving:
    """The file of an unfinished refinement, and how often it is saved; the same call resumes from it."""

    file: Path
    every_s: float = 60.0


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
    """Train a copy of the student towards each teacher's outputs on that teacher's inputs; returns it and what it took.

    Every batch holds equally many samples of each teacher, so that batch-norm gets them mixed, as in use. The loss
    is the squared error of the outputs (of a sample's own task, see heads.py) over their variance, of numbers that
    are no logits column by column (`likelihood`; None: all are logits), so that no scale weighs more. Adam runs a
    one-cycle schedule over the choice's `steps`, or over processor seconds (other work may share the machine): a
    slower machine then takes fewer steps and still completes the cycle. The factors must be balanced
    (decompose.balance). Batch-norm statistics follow the data; dropout stays off. No labels are read. `steps` give
    the same bytes on every run, interrupted or not. `on_progress` gets the share done before each step. Operators
    with `grids` learn through the rounding (through.py), and the result's weights are on them. BuildError if the loss
    is no longer finite.
    """
    training = _begin(student, choice, seed, grids)
    measured = [measure_teacher(*teacher, likelihood) for teacher in teachers]
    pools = [inputs for _, inputs in teachers]
    plain = likelihood is None or all(answer.is_choice for answer in likelihood.values())
    units = {} if plain else list_units(training.student)
    if saving is not None and saving.file.is_file():
        restore(training, saving.file)
    started, kept = clock() - training.cpu_seconds, time.monotonic()
    while (share := measure_share(choice, training.steps, clock() - started)) < 1:
        on_progress(share)
        joined, parts = draw_batches(pools, choice.augment, training.student, training.generator)
        loss = measure_loss(training.student, measured, joined, parts)
        if not loss.isfinite():
            raise BuildError(
                f"refinement diverged at step {training.steps}",
                hint="leave [refine] out, or allow a larger budget",
            )
        training.optimizer.zero_grad()
        torch.autograd.backward(loss)
        for group in training.optimizer.param_groups:
            group["lr"] = find_step_size(choice, share)
        with stepping(units):
            training.optimizer.step()
        training.steps += 1
        if saving is not None and time.monotonic() - kept >= saving.every_s:
            training.cpu_seconds = clock() - started
            keep(training, saving.file)
            kept = time.monotonic()
    taken = Refinement(steps=training.steps, cpu_seconds=clock() - started, augment=choice.augment)
    end_rounding(training.student)
    return training.student.eval(), taken


def _begin(student: nn.Module, choice: RefineChoice, seed: int, grids: Mapping[str, Grid]) -> Training:
    """A new training on a copy of the student, whose batch-norms follow the data."""
    student = copy.deepcopy(student).eval()
    for module in student.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    begin_rounding(student, grids)
    optimizer = torch.optim.Adam(student.parameters(), lr=choice.step_size)
    return Training(student, optimizer, torch.Generator().manual_seed(seed))
