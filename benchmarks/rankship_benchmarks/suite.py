"""A suite: what to measure, how often and how long. One TOML file, or the defaults for one recipe."""

from pathlib import Path

from rankship_pipeline.codec import read_toml
from rankship_pipeline.errors import InputError
from rankship_pipeline.records import record


@record
class Suite:
    """Every artifact of `recipe` (a path beside the suite), timed in `rounds` interleaved rounds of fresh processes.

    A trial's timed loop ends when `min_samples` and `min_duration_ms` are both reached; its warm-up ends when steady,
    at the latest after `max_warmup_ms`; one that is not done after `timeout_s` is an error. Six rounds are the fewest
    that give a 95 % interval of the median, 12 the fewest that show whether rounds hang together. With `canary` a small
    frozen model is timed in every round too, so that a change of the device is not taken for one of the build.
    """

    recipe: str
    rounds: int = 6
    threads: int = 1
    min_samples: int = 200
    min_duration_ms: int = 200
    max_warmup_ms: int = 1500
    timeout_s: int = 900
    canary: bool = True


def read_suite(path: Path) -> tuple[Suite, Path]:
    """A suite and the path of its recipe."""
    suite = read_toml(Suite, path, "suite")
    for name in ("rounds", "threads", "min_samples", "min_duration_ms", "max_warmup_ms", "timeout_s"):
        if getattr(suite, name) < 1:
            raise InputError(f"{path}: {name} must be at least 1, got {getattr(suite, name)}", hint="correct the suite")
    return suite, path.resolve().parent / suite.recipe


def read_suite_of(recipe: Path, path: Path) -> Suite:
    """A suite that is this recipe's; InputError where it names another."""
    suite, named = read_suite(path)
    if named.resolve() != recipe.resolve():
        message = f"{path} is a suite of {named}, not of {recipe}"
        raise InputError(message, hint="give the suite of this recipe, or that recipe")
    return suite
