"""The progress of a refinement, and the size of its next step."""

import torch

from rankship_pipeline.recipe.choices import RefineChoice

_WARM = 0.3  # share of the refinement over which the steps grow


def measure_share(choice: RefineChoice, steps: int, cpu_seconds: float) -> float:
    """The share of the choice's steps or seconds that is used; 1 at the end."""
    return steps / choice.steps if choice.steps is not None else cpu_seconds / float(choice.cpu_seconds or 0)


def find_step_size(choice: RefineChoice, share: float) -> float:
    """The one-cycle schedule (Smith 2018): up from 1/25 in the first 30 %, then down to nearly nothing, as cosines."""
    if share < _WARM:
        return choice.step_size * (0.04 + 0.96 * 0.5 * (1 - _cosine(torch.pi * share / _WARM)))
    return choice.step_size * max(1e-4, 0.5 * (1 + _cosine(torch.pi * min(1.0, (share - _WARM) / (1 - _WARM)))))


def _cosine(angle: float) -> float:
    return float(torch.cos(torch.tensor(angle)))
