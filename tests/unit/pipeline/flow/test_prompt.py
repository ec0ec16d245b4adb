"""A prompt's tokens and what torch says after it, by the model's own tokenizer."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from make.token_files import GENERATION, VOCABULARY, compute_logits, continue_greedily
from make.writers import save_tokenizer
from rankship_pipeline.flow import prompt as prompts
from rankship_pipeline.flow.prompt import Prompt, read_prompt
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.recipe.choices import Source

GENERATES = replace(GENERATION, ends=(1,))


class Summing(nn.Module):
    """The decoder of make/token_files.py in torch."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(compute_logits(tokens.numpy()))


@pytest.fixture
def prepared(tmp_path: Path) -> Any:  # noqa: ANN401 - what of a prepared recipe is read
    save_tokenizer(tmp_path / "writer")
    recipe = SimpleNamespace(name="r", models=[Source(name="m", huggingface="writer")])
    return SimpleNamespace(recipe=recipe, folder=tmp_path, generation=GENERATES)


def test_a_prompt_is_numbered_and_what_follows_it_is_written_without_it(prepared: Any) -> None:  # noqa: ANN401
    prompt = read_prompt(prepared, "the cat")
    assert prompt.tokens == (0, 3, 4)
    assert prompt.write((7, 5, 1)) == " sees dog"
    assert prompt.write(()) == ""


def test_a_prompt_that_nothing_can_follow_is_refused(prepared: Any) -> None:  # noqa: ANN401
    with pytest.raises(InputError, match="has 24 tokens, the context of 24 takes 1 to 23"):
        read_prompt(prepared, " ".join(["cat"] * 23))
    prepared.generation = None
    with pytest.raises(InputError, match="the files of r do not generate text"):
        read_prompt(prepared, "the cat")


@pytest.mark.parametrize(("count", "ends"), [(4, ()), (100, ()), (100, (8,))])
def test_torch_goes_on_as_the_agent_does(count: int, ends: tuple[int, ...]) -> None:
    start = (1, 2, 3, 4)
    prompt = Prompt(text="", tokens=start, generation=replace(GENERATION, ends=ends), tokenizer=None)
    wanted = continue_greedily(torch.tensor([start]).numpy(), min(count, GENERATION.context - len(start) + 1))
    found = prompts.continue_greedily(Summing(), prompt, count)
    if set(ends) & set(wanted):
        wanted = wanted[: wanted.index(ends[0]) + 1]
    assert list(found) == wanted
    assert max(found) < VOCABULARY
