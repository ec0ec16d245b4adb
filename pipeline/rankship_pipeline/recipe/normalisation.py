"""What a recipe says to keep one model like its specialists: their inputs' normalisation, a gate, and refinement."""

from math import isclose
from typing import Literal

from rankship_pipeline.foundation.records import record

Augmentation = Literal["none", "flip-and-shift"]


@record
class Normalisation:
    """What images went through before a model saw them: (pixel − mean) / std per channel, pixels in [0, 1].

    One value serves all channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def is_like(self, other: "Normalisation") -> bool:
        """Whether both do the same to every channel, rounding aside."""
        channels = max(len(self.mean), len(other.mean))
        pairs = ((self.mean, other.mean), (self.std, other.std))
        return all(
            isclose(mine[index % len(mine)], theirs[index % len(theirs)], rel_tol=1e-9, abs_tol=1e-12)
            for mine, theirs in pairs
            for index in range(channels)
        )


@record
class QualityChoice:
    """How many points a specialist may lose: of test accuracy where the loader gives its `tests`, else of agreement.

    `max_merge_loss_points` judges the merged model, `max_loss_points` what is exported after it. None: measured and
    reported, never refused.
    """

    max_merge_loss_points: float | None = None
    max_loss_points: float | None = None


@record
class RefineChoice:
    """Label-free refinement of the compressed model (refine.py), for exactly one of: processor time or steps.

    Only `steps` give the same bytes on every run; `augment` is what may be done to the inputs. `step_size` is Adam's at
    the top of its cycle: as METHODS §1 found it for convolutions; transformers want a fifth of it or less.
    """

    cpu_seconds: float | None = None
    steps: int | None = None
    augment: Augmentation = "none"
    step_size: float = 3e-3


def check_normalisation(given: Normalisation | None, where: str) -> list[str]:
    """Complaints about one normalisation, naming `where` it was written."""
    if given is None or (len(given.mean) == len(given.std) >= 1 and all(std > 0 for std in given.std)):
        return []
    return [
        f"{where}: normalise needs one positive std per mean, got mean {list(given.mean)} and std {list(given.std)}"
    ]


def check_quality(choice: QualityChoice) -> list[str]:
    """Complaints about the gate."""
    gates = {
        "max_merge_loss_points": choice.max_merge_loss_points,
        "max_loss_points": choice.max_loss_points,
    }
    return [
        f"quality.{key} must lie in [0, 100], got {points}"
        for key, points in gates.items()
        if points is not None and not 0 <= points <= 100  # noqa: PLR2004 - points of a hundred
    ]


def check_refinement(choice: RefineChoice | None) -> list[str]:
    """Complaints about refinement."""
    if choice is None:
        return []
    if not 0 < choice.step_size <= 1:
        return [f"refine.step_size must lie in (0, 1], got {choice.step_size}"]
    amounts = [one for one in (choice.cpu_seconds, choice.steps) if one is not None]
    if len(amounts) == 1 and amounts[0] > 0:
        return []
    return ["[refine] needs exactly one of cpu_seconds and steps, above zero"]
