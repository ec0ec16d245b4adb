"""What is timed of a build: its artifacts, and of one that generates each phase, under a key of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rankship_benchmarks.bundle.suite import DelegateChoice, GenerationChoice, Suite
from rankship_benchmarks.measure.host_gate import find_inputs
from rankship_pipeline.foundation.artifact_key import DECODE, Delegate, prefill_of
from rankship_pipeline.foundation.delegates import DELEGATES, find_facts
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.records import Artifact
from rankship_pipeline.foundation.store import Store


def list_cases(artifacts: Sequence[Artifact], suite: Suite) -> tuple[Artifact, ...]:
    """Return a case for every artifact and delegate that it is timed with, and of one that generates for each phase.

    The part of a case's key is its phase, and its `generation.prompt_tokens` the length of the prompt. The canary is
    timed as its runtime computes it by itself. InputError for a delegate that no file was made for.
    """
    _refuse_missing(artifacts, suite.delegates)
    given = (case for one in artifacts for case in _delegate(one, suite.delegates))
    return tuple(case for one in given for case in _split(one, suite.generation))


def list_wanted(suite: Suite, formats: Sequence[Format]) -> dict[Format, tuple[Delegate, ...]]:
    """Return the formats of a build with the delegates that their runtimes must have, beside what each does itself."""
    chosen = {name: suite.delegates.list_chosen(name) or () for name in formats}
    return {name: tuple(one.delegate for one in some if one != DELEGATES[name][0]) for name, some in chosen.items()}


def _delegate(artifact: Artifact, choice: DelegateChoice) -> Iterator[Artifact]:
    """Yield the artifact once for each delegate that its runtime is asked for; ExecuTorch's are in the files."""
    chosen = choice.list_chosen(artifact.key.format)
    if artifact.key.variant == "canary" or chosen is None:
        yield artifact
    elif FACTS[artifact.key.format].holds_delegate:
        yield from [artifact] if find_facts(artifact.key) in chosen else []
    else:
        asked = [one.delegate for one in chosen if one.asked == "runtime"]
        yield from (replace(artifact, key=replace(artifact.key, delegate=one)) for one in asked)


def _refuse_missing(artifacts: Sequence[Artifact], choice: DelegateChoice) -> None:
    made = {artifact.key.format: set[Delegate]() for artifact in artifacts if artifact.key.variant != "canary"}
    for artifact in artifacts:
        if artifact.key.variant != "canary":
            made[artifact.key.format].add(artifact.key.delegate)
    for name, there in made.items():
        for one in choice.list_chosen(name) or ():
            if one.asked == "file" and one.delegate not in there:
                message = f"the suite times {name} files with {one.word}, but none was made for it"
                raise InputError(message, hint=f'add "{one.word}" to `export.{name}` of the recipe')


def _split(artifact: Artifact, choice: GenerationChoice) -> list[Artifact]:
    generation = artifact.generation
    if generation is None:
        return [artifact]
    prompts = _fit_prompts(generation, choice)
    phases = [(prefill_of(length), length) for length in prompts]
    if prompts[0] < generation.context:  # a token after the shortest prompt
        phases.append((DECODE, prompts[0]))
    return [
        replace(artifact, key=replace(artifact.key, part=part), generation=replace(generation, prompt_tokens=length))
        for part, length in phases
    ]


def _fit_prompts(generation: Generation, choice: GenerationChoice) -> list[int]:
    """List the lengths that fit the context, the shortest first; where none does, that of the proof."""
    return [one for one in sorted(set(choice.prompt_tokens)) if one <= generation.context] or [generation.prompt_tokens]


def make_inputs(case: Artifact, store: Store, choice: GenerationChoice, folder: Path) -> list[Path]:
    """Return the files that a case is timed on; tokens, those of its proof over and over, are written to `folder`."""
    proven = find_inputs((case,), store)
    if case.generation is None:
        return proven
    prompt, path = case.generation.prompt_tokens, folder / "tokens.npy"
    more = choice.new_tokens if case.key.phase == "decode" else 0
    (first, *_) = np.load(proven[0], allow_pickle=False)
    np.save(path, np.resize(first, (1, min(prompt + more, case.generation.context))))
    return [path]
