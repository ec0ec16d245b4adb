"""Evaluates the models and files of a finished build of a language model on text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from rankship_benchmarks.texts.file_model import FileModel
from rankship_pipeline.evaluate.perplexity import Perplexity, measure_labelled_perplexity
from rankship_pipeline.evaluate.zero_shot import Reading, TaskScore, evaluate_tasks
from rankship_pipeline.export.artifact import find_proof
from rankship_pipeline.export.runner import Runner
from rankship_pipeline.flow.final_models import list_models
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.artifact_key import Precision, Variant
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.records import Artifact, Build
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.model_config import load_tokenizer

_BATCH = 4  # texts at once: a vocabulary of 50,000 takes 50 MB of logits for each 256 tokens


@record
class TextChoice:
    """What to judge on: the first `windows` windows of the test text, and zero-shot tasks.

    `formats` are those whose files are run. `tasks` are names of lm-evaluation-harness's task files in `task_folder`;
    `limit` is the number of documents of each, None for all.
    """

    windows: int
    formats: tuple[Format, ...]
    tasks: tuple[str, ...] = ()
    task_folder: Path = Path()
    limit: int | None = None


@record
class Evaluated:
    """What one model, or one file in its runtime, does on text; `runner` is "torch" or the file's format.

    Every row of an evaluation is measured on the same windows of the recipe's test text.
    """

    variant: Variant
    precision: Precision
    runner: str
    perplexity: Perplexity
    tasks: tuple[TaskScore, ...] = ()


def evaluate_build(
    prepared: Prepared, build: Build, store: Store, steps: Steps, runner: Runner, choice: TextChoice
) -> Iterator[Evaluated]:
    """Yield the dense and the compressed models in torch, then every file in its runtime.

    InputError if the build generates no text.
    """
    if prepared.generation is None:
        raise InputError(
            f"the models of {prepared.recipe.name} do not generate text",
            hint='`rankship show` prints their scores; state task = "causal-lm" for a language model',
        )
    (tokens,), labels = prepared.data.test_inputs, prepared.data.labels
    tokens, labels = tokens[: choice.windows], labels[: choice.windows]
    if tokens.shape[1] > prepared.generation.context:
        raise InputError(
            f"windows of {tokens.shape[1]} tokens do not fit the files, which take {prepared.generation.context}",
            hint="set data.tokens to at most export.context, or export.context to as many",
        )
    tokenizer: Any = load_tokenizer(prepared.recipe.models[0], prepared.folder)
    reading = _read_as_trained(prepared.generation, tokenizer)

    def judge(model: nn.Module, variant: Variant, precision: Precision, runs_in: str) -> Evaluated:
        with steps.step(f"evaluate {variant}, {precision}, in {runs_in}"):
            found = measure_labelled_perplexity(model, tokens, labels, batch=_BATCH)
            scores = tuple[TaskScore, ...]()
            if choice.tasks:
                scores = evaluate_tasks(
                    model, tokenizer, choice.tasks, choice.task_folder, choice.limit, reading=reading
                )
        return Evaluated(variant=variant, precision=precision, runner=runs_in, perplexity=found, tasks=scores)

    for variant, precision, module in list_models(Stages(prepared, store, steps), prepared):
        yield judge(module, variant, precision, "torch")
    for artifact in build.artifacts:
        key = artifact.key
        if key.format in choice.formats:
            yield judge(open_file(artifact, store, runner), key.variant, key.precision, key.format)


def open_file(artifact: Artifact, store: Store, runner: Runner) -> FileModel:
    """A file that generates text, as a module."""
    if artifact.generation is None:
        raise InputError(f"{artifact.key.title} does not generate text", hint='state task = "causal-lm" in [[models]]')
    path, _, _ = find_proof(artifact, store)
    return FileModel(artifact.key.format, path, artifact.generation, runner)


def _read_as_trained(generation: Generation, tokenizer: Any) -> Reading:  # noqa: ANN401 - transformers has no types
    """How the model reads texts: with the token before the first that its tokenizer gives, if it does."""
    begin = generation.begin if generation.begin is not None else next(iter(generation.ends), 0)
    return Reading(
        length_tokens=generation.context,
        prefix_token=begin,
        always_prefixed=list(tokenizer("a")["input_ids"][:1]) == [begin],
        batch=_BATCH,
    )
