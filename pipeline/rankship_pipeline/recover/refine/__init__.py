"""Label-free refinement: a compressed model trained for a stated amount to say what the dense models say.

draw.py gives each step its samples, teach.py its loss, schedule.py its size; save.py keeps what is unfinished.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.records import Refinement
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.recipe.choices import RefineChoice
from rankship_pipeline.recover.refine.draw import draw_batches
from rankship_pipeline.recover.refine.save import Training, keep, restore
from rankship_pipeline.recover.refine.schedule import find_step_size, measure_share
from rankship_pipeline.recover.refine.teach import measure_loss, measure_teacher


@dataclass(frozen=True)
class Saving:
    """Where an unfinished refinement is kept, and how often; the same call goes on from there."""

    file: Path
    every_s: float = 60.0


def refine(
    student: nn.Module,
    teachers: Sequence[tuple[nn.Module, Inputs]],
    choice: RefineChoice,
    seed: int,
    *,
    clock: Callable[[], float] = time.process_time,
    saving: Saving | None = None,
    on_progress: Callable[[float], None] = lambda _share: None,
) -> tuple[nn.Module, Refinement]:
    """A copy of the student trained towards each teacher's logits on its own inputs, and what that took.

    Every batch holds as many samples of each teacher, so that batch-norm sees them mixed as it will in use. The loss is
    the squared error of the logits (of a sample's own task, see heads.py) over their variance, so that teachers of
    different scale weigh the same; Adam on a one-cycle schedule over the choice's `steps`, or by the clock (seconds of
    the processor: other work may share the machine), so that a slower machine takes fewer steps and still ends at the
    bottom. Factors are balanced already (decompose.balance), which this needs. Batch-norm statistics follow the data;
    dropout stays off. No labels are read. `steps` give the same bytes on every run, interrupted or not;
    `on_progress` gets the share that is done before each step. BuildError where the loss is no longer finite.
    """
    training = _begin(student, choice, seed)
    measured = [measure_teacher(*teacher) for teacher in teachers]
    pools = [inputs for _, inputs in teachers]
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
        training.optimizer.step()
        training.steps += 1
        if saving is not None and time.monotonic() - kept >= saving.every_s:
            training.cpu_seconds = clock() - started
            keep(training, saving.file)
            kept = time.monotonic()
    taken = Refinement(steps=training.steps, cpu_seconds=clock() - started, augment=choice.augment)
    return training.student.eval(), taken


def _begin(student: nn.Module, choice: RefineChoice, seed: int) -> Training:
    """A copy of the student whose batch-norms follow the data, with nothing done yet."""
    student = copy.deepcopy(student).eval()
    for module in student.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    optimizer = torch.optim.Adam(student.parameters(), lr=choice.step_size)
    return Training(student, optimizer, torch.Generator().manual_seed(seed))
