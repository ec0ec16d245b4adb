"""The samples in a file or folder of data, and their split into calibration and test samples."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.recipe.choices import DataChoice

CALIBRATION = 256  # samples, if the data have twice as many
TESTS = 1000
_LEAST = 16


@dataclass(frozen=True)
class Samples:
    """`count` samples, the names of their classes (None: no labels), and `read`, which makes inputs of chosen ones.

    `read_labels` makes labels of chosen ones where they are no names. `most` are the numbers of calibration and test
    samples to draw where the recipe says nothing.
    """

    count: int
    labels: tuple[str, ...] | None
    read: Callable[[Sequence[int]], tuple[Tensor, ...]]
    read_labels: Callable[[Sequence[int]], Tensor] | None = None
    most: tuple[int, int] = (CALIBRATION, TESTS)


def find_path(written: str, folder: Path) -> Path:
    """A path in the recipe: relative to it or absolute; `$NAME` is an environment variable, `~` the home folder."""
    return folder / os.path.expanduser(os.path.expandvars(written))  # noqa: PTH111 - $NAME may hold a ~


def split(
    count: int, choice: DataChoice, seed: int, most: tuple[int, int] = (CALIBRATION, TESTS)
) -> tuple[list[int], list[int]]:
    """The indices of the calibration and of the test samples; no sample is in both.

    The tests are the same for every seed, so that results of several seeds can be compared; the seed draws the
    calibration samples from the rest.
    """
    if count < _LEAST and (choice.calibration_samples is None or choice.test_samples is None):
        raise InputError(
            f"{choice.origin}: {count} samples; at least {_LEAST} are needed, half to calibrate and half to test",
            hint="give more samples; some hundreds to calibrate and as many to test work well",
        )
    asked, tested = choice.calibration_samples, choice.test_samples
    tests = min(most[1], count - (min(most[0], count // 2) if asked is None else asked)) if tested is None else tested
    calibration = min(most[0], count - tests) if asked is None else asked
    if calibration < 1 or tests < 1 or calibration + tests > count:
        raise InputError(
            f"{choice.origin}: {count} samples cannot give {max(calibration, 1)} to calibrate and {max(tests, 1)} to"
            " test",
            hint="lower calibration_samples or test_samples in [data], or give more data",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    rest = order[tests:]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:calibration]
    return rest[drawn].tolist(), order[:tests].tolist()
