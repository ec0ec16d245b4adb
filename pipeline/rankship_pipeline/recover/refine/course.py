"""The course of a refinement: its steps and their sizes, its progress, and the file that it resumes from."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.recipe.choices import RefineChoice
from rankship_pipeline.recover.refine.save import Training, keep, restore
from rankship_pipeline.recover.refine.schedule import find_step_size, measure_share
from rankship_pipeline.recover.refine.units import stepping


@dataclass(frozen=True)
class Saving:
    """The file of an unfinished refinement, and how often it is saved; the same call resumes from it."""

    file: Path
    every_s: float = 60.0


class Course:
    """A training on its way through a choice's steps or processor seconds; begins where a saved one was."""

    def __init__(
        self,
        training: Training,
        choice: RefineChoice,
        clock: Callable[[], float],
        saving: Saving | None,
        on_progress: Callable[[float], None],
    ) -> None:
        self.training, self.choice = training, choice
        self._clock, self._saving, self._on_progress = clock, saving, on_progress
        if saving is not None and saving.file.is_file():
            restore(training, saving.file)
        self._started, self._kept = clock() - training.cpu_seconds, time.monotonic()

    @property
    def cpu_seconds(self) -> float:
        """The processor seconds taken so far, without interruptions."""
        return self._clock() - self._started

    def look(self) -> float:
        """The share of the steps or seconds that is used, 1 or more at the end; tells it as progress before."""
        share = measure_share(self.choice, self.training.steps, self.cpu_seconds)
        if share < 1:
            self._on_progress(share)
        return share

    def step(self, loss: Tensor, share: float, units: Mapping[nn.Parameter, Tensor] = MappingProxyType({})) -> None:
        """Take one step down the loss, of the size at that `share` of a one-cycle schedule, in these units."""
        training = self.training
        if not loss.isfinite():
            raise BuildError(
                f"refinement diverged at step {training.steps}",
                hint="leave [refine] out, or allow a larger budget",
            )
        training.optimizer.zero_grad()
        torch.autograd.backward(loss)
        for group in training.optimizer.param_groups:
            group["lr"] = find_step_size(self.choice, share)
        with stepping(units):
            training.optimizer.step()
        training.steps += 1
        if self._saving is not None and time.monotonic() - self._kept >= self._saving.every_s:
            training.cpu_seconds = self.cpu_seconds
            keep(training, self._saving.file)
            self._kept = time.monotonic()
