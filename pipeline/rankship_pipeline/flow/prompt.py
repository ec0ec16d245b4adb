"""A text that a recipe's models continue: its tokens, and what the dense torch model says after it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.model_config import load_tokenizer
from rankship_pipeline.models.token_windows import check_tokens

NEW_TOKENS = 64


@dataclass(frozen=True)
class Prompt:
    """A text with the tokens that a model's own tokenizer makes of it, and how the model's files go on with them."""

    text: str
    tokens: tuple[int, ...]
    generation: Generation
    tokenizer: Any

    def write(self, tokens: tuple[int, ...]) -> str:
        """The text of further tokens, as it follows the prompt; tokens that are no text are left out."""
        before, whole = (
            self.tokenizer.decode([*self.tokens, *more], skip_special_tokens=True) for more in ((), tokens)
        )
        return str(whole).removeprefix(str(before))


def read_prompt(prepared: Prepared, text: str) -> Prompt:
    """Make a text's tokens; InputError if the recipe's files do not generate, or the context has no room for it."""
    generation = prepared.generation
    if generation is None:
        raise InputError(
            f"--prompt: the files of {prepared.recipe.name} do not generate text",
            hint='leave it out; of a language model, state task = "causal-lm" in [[models]]',
        )
    tokenizer = load_tokenizer(prepared.recipe.models[0], prepared.folder)
    tokens = [int(one) for one in tokenizer(text, verbose=False)["input_ids"]]
    while tokens and tokens[-1] in generation.ends and len(tokens) > 1:  # some tokenizers end every text
        tokens.pop()
    check_tokens(torch.tensor(tokens), generation.vocabulary, prepared.recipe.models[0].name)
    if not 1 <= len(tokens) < generation.context:
        room = f"the context of {generation.context} takes 1 to {generation.context - 1}"
        raise InputError(
            f"--prompt has {len(tokens)} tokens, {room}", hint="give a shorter text, or set export.context"
        )
    return Prompt(text=text, tokens=tuple(tokens), generation=generation, tokenizer=tokenizer)


def continue_dense(
    prepared: Prepared, store: Store, steps: Steps, prompt: Prompt, count: int = NEW_TOKENS
) -> tuple[int, ...]:
    """The tokens that the dense model of a build, merged if the recipe merges, says after a prompt."""
    merged, _ = Stages(prepared, store, steps).merge(prepared.recipe.merge.method)
    with steps.step("continue the prompt in torch"):
        return continue_greedily(merged.module, prompt, count)


@torch.inference_mode()
def continue_greedily(module: nn.Module, prompt: Prompt, count: int) -> tuple[int, ...]:
    """The likeliest token each time, over the whole text without a cache.

    Ends like the agent: after `count` tokens, after one that ends a text, or where the context is full.
    """
    given, found = torch.tensor([prompt.tokens]), list[int]()
    for _ in range(min(count, prompt.generation.context - len(prompt.tokens) + 1)):
        found.append(int(module(given)[0, -1].argmax()))
        if found[-1] in prompt.generation.ends:
            break
        given = torch.cat([given, torch.tensor([found[-1:]])], dim=1)
    return tuple(found)
