"""What is timed of a build: its artifacts, and of one that generates each phase, under a key of its own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rankship_benchmarks.bundle.suite import GenerationChoice
from rankship_benchmarks.measure.host_gate import find_inputs
from rankship_pipeline.foundation.artifact_key import DECODE, prefill_of
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.records import Artifact
from rankship_pipeline.foundation.store import Store


def list_cases(artifacts: Sequence[Artifact], choice: GenerationChoice) -> tuple[Artifact, ...]:
    """Return every artifact that does not generate, and in place of one that does a case for each of its phases.

    The part of a case's key is its phase, and its `generation.prompt_tokens` the length of the prompt.
    """
    return tuple(case for one in artifacts for case in _split(one, choice))


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
