"""A suite: what to measure, how often and how long. One TOML file, or the defaults for one recipe."""

from pathlib import Path
from typing import Literal

from rankship_pipeline.foundation.codec import read_toml
from rankship_pipeline.foundation.delegates import DELEGATES, DelegateFacts, find_word
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.recipe.budget import TOKEN_TIMES, Budget
from rankship_targets.devices.meter_choice import MeterChoice, MeterName

FEWEST_ENERGY_ROUNDS = 5
_SHORTEST_MS = 1000


@record
class EnergyChoice:
    """Measures energy in separate trials, each a rest, a timed loop and a rest.

    Over ten seconds a meter that shows a new value every 32 ms is off by less than 1 %; shorter loops have wider
    bounds, which the report shows.

    Keys:
        rounds: at least five, which show the spread; six give the ratio an interval
        busy_ms: minimum length of the timed loop
        idle_ms: length of the rest before and after
    """

    rounds: int = 6
    busy_ms: int = 10_000
    idle_ms: int = 10_000


@record
class EnergyPlan:
    """How a run reads energy: the suite's choice and the device's meter; `rails` are added up, () is the only one.

    `calibration_ppm` is how far the meter's gain may be off, None if the inventory does not state it.
    """

    choice: EnergyChoice
    meter: MeterName
    period_us: int
    rails: tuple[str, ...]
    calibration_ppm: int | None


@record
class GenerationChoice:
    """Times files that generate by phase: whole prompts, and single tokens after the shortest of them.

    Keys:
        prompt_tokens: the lengths of prompts; of a model, those that its context holds
        min_prompts: prompts of a timed loop at least, in place of the suite's `min_samples`, which counts tokens
        new_tokens: tokens timed after the prompt, until the cache is set back to the prompt's end
    """

    prompt_tokens: tuple[int, ...] = (16, 128)
    min_prompts: int = 5
    new_tokens: int = 128


@record
class AccuracyChoice:
    """Scores every case on the device, beside the host's runtime, by the recipe's own measure.

    Keys:
        samples: how many of the recipe's labelled test inputs, evenly spaced
    """

    samples: int


@record
class DelegateChoice:
    """What computes the files on the device: each is timed with every delegate of its format.

    Where a device's runtime lacks one, nothing is measured there. Of files that generate, and of those for a recipe's
    further shapes, only the first is used with `benchmark_model`.

    Keys:
        onnx: "cpu" is onnxruntime's own; "xnnpack" and "nnapi" are providers that few builds of it have
        tflite: "xnnpack" is what LiteRT uses by itself, "plain" its own kernels; "gpu" and "nnapi" are measured with
            the inventory's `benchmark_model`, which reports no samples
        executorch: "xnnpack", "plain", "vulkan", which the recipe's `export.executorch` made files for; left out, all
            that it made
    """

    onnx: tuple[Literal["cpu", "xnnpack", "nnapi"], ...] = ("cpu",)
    tflite: tuple[Literal["xnnpack", "plain", "gpu", "nnapi"], ...] = ("xnnpack",)
    executorch: tuple[Literal["xnnpack", "plain", "vulkan"], ...] | None = None

    def list_chosen(self, artifact_format: Format) -> tuple[DelegateFacts, ...] | None:
        """Return the delegates that a format's files are timed with; None for all that there are files for."""
        words: tuple[str, ...] | None = getattr(self, artifact_format)
        return None if words is None else tuple(find_word(artifact_format, word) for word in dict.fromkeys(words))


def plan_energy(choice: EnergyChoice, meter: MeterChoice) -> EnergyPlan:
    """Join the suite's choice with the inventory's entry for the meter, without the path of the meter's file."""
    return EnergyPlan(
        choice=choice,
        meter=meter.name,
        period_us=meter.period_us,
        rails=meter.rails,
        calibration_ppm=meter.calibration_ppm,
    )


@record
class Suite:
    """Every artifact of a recipe, timed in interleaved rounds of fresh processes.

    Keys:
        recipe: the recipe's path, relative to the suite
        rounds: six are the fewest that give a 95 % interval of the median, 12 the fewest that show whether rounds
            are correlated
        threads: threads of the runtime
        min_samples: a timed loop ends when this and `min_duration_ms` are both reached
        min_duration_ms: see `min_samples`
        max_warmup_ms: a warm-up ends when the times are steady, or after this
        timeout_s: a trial that takes longer is an error
        canary: times a small frozen model in every round too, so that a change of the device is not mistaken for a
            change of the build
        energy: reads the device's meter in separate trials, after all others
        generation: how files that generate are timed
        delegates: what computes the files on the device
        accuracy: runs a part of the test set on the device, after all trials
    """

    recipe: str
    rounds: int = 6
    threads: int = 1
    min_samples: int = 200
    min_duration_ms: int = 200
    max_warmup_ms: int = 1500
    timeout_s: int = 900
    canary: bool = True
    energy: EnergyChoice | None = None
    generation: GenerationChoice = GenerationChoice()
    delegates: DelegateChoice = DelegateChoice()
    accuracy: AccuracyChoice | None = None


def default_suite(recipe: str, budget: Budget | None = None) -> Suite:
    """The suite where none is given, by the recipe's own name: `rankship run` and `measure` go on with one run.

    Under a budget for tokens they are timed with its prompt.
    """
    if budget is None or not budget.amounts.keys() & TOKEN_TIMES:
        return Suite(recipe=recipe)
    return Suite(recipe=recipe, generation=GenerationChoice(prompt_tokens=(budget.prompt,)))


def read_suite(path: Path) -> tuple[Suite, Path]:
    """Read a suite; returns it and the path of its recipe."""
    suite = read_toml(Suite, path, "suite")
    check_suite(suite, str(path))
    return suite, path.resolve().parent / suite.recipe


def check_suite(suite: Suite, where: str) -> None:
    """Raise InputError if a number is too small; `where` names the suite."""
    for name in ("rounds", "threads", "min_samples", "min_duration_ms", "max_warmup_ms", "timeout_s"):
        if getattr(suite, name) < 1:
            raise InputError(
                f"{where}: {name} must be at least 1, got {getattr(suite, name)}", hint="correct the suite"
            )
    if suite.energy is not None:
        _check_energy(suite.energy, where)
    if suite.accuracy is not None and suite.accuracy.samples < 1:
        message = f"{where}: accuracy.samples must be at least 1, got {suite.accuracy.samples}"
        raise InputError(message, hint="correct the suite, or leave [accuracy] out")
    for name in FORMATS:
        chosen = suite.delegates.list_chosen(name)
        if chosen is not None and all(one.asked == "benchmark_model" for one in chosen):
            message = f"{where}: delegates.{name} names nothing that is timed with samples"
            raise InputError(message, hint=f'add "{DELEGATES[name][0].word}", or leave the key out')
    choice = suite.generation
    numbers = {"min_prompts": choice.min_prompts, "new_tokens": choice.new_tokens}
    numbers["prompt_tokens"] = min(choice.prompt_tokens, default=0)
    for name, lowest in numbers.items():
        if lowest < 1:
            message = f"{where}: generation.{name} must be at least 1, got {getattr(choice, name)}"
            raise InputError(message, hint="correct the suite")


def _check_energy(energy: EnergyChoice, where: str) -> None:
    least = {"rounds": FEWEST_ENERGY_ROUNDS, "busy_ms": _SHORTEST_MS, "idle_ms": _SHORTEST_MS}
    for name, lowest in least.items():
        if getattr(energy, name) < lowest:
            message = f"{where}: energy.{name} must be at least {lowest}, got {getattr(energy, name)}"
            raise InputError(message, hint="correct the suite")


def read_suite_of(recipe: Path, path: Path) -> Suite:
    """Read a suite of this recipe; InputError if it names another."""
    suite, named = read_suite(path)
    if named.resolve() != recipe.resolve():
        message = f"{path} is a suite of {named}, not of {recipe}"
        raise InputError(message, hint="give the suite of this recipe, or that recipe")
    return suite
