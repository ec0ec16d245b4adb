"""Budgets for tokens are for models that generate, and for prompts that fit their files."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from make.token_files import CONTEXT, GENERATION
from rankship_pipeline.flow.checks import check_context, check_writers
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import DataChoice, Recipe, Source

TOKEN, FIRST = Budget(token_ms=4, on="pi4"), Budget(time_to_first_token_ms=4, on="pi4")
BOTH = Budget(token_ms=4, time_to_first_token_ms=4, on="pi4")


def make_recipe(budget: Budget, task: Any = "causal-lm") -> Recipe:  # noqa: ANN401 - of choices
    return Recipe(name="r", models=(Source(name="m", huggingface="h", task=task),), data=DataChoice(), budget=budget)


def test_a_device_may_time_tokens_and_no_whole_language_model() -> None:
    for budget in (TOKEN, FIRST, BOTH):
        check_writers(make_recipe(budget), {})
    for budget in (Budget(latency_ms=4, on="pi4"), Budget(latency_us=4, costs="c"), Budget(energy_uj=4, costs="c")):
        with pytest.raises(InputError, match=f"run in phases, budget.{next(iter(budget.amounts))} names none"):
            check_writers(make_recipe(budget), {})


def test_other_models_have_no_tokens() -> None:
    for key, budget in {"token_ms": TOKEN, "time_to_first_token_ms": FIRST}.items():
        with pytest.raises(InputError, match=f"budget.{key} belongs to models of the task"):
            check_writers(make_recipe(budget, "text-generation"), {})


def test_both_times_of_tokens_are_a_limit_each() -> None:
    assert BOTH.limits == (FIRST, TOKEN)
    assert [one.part for one in BOTH.limits] == ["prefill 128", "decode"]
    assert TOKEN.limits == (TOKEN,)


@pytest.mark.parametrize(
    ("budget", "most"),
    [(FIRST, CONTEXT), (TOKEN, CONTEXT - 1), (BOTH, CONTEXT - 1)],
    ids=["first token", "further token", "both"],
)
def test_a_prompt_fits_the_context_with_the_token_that_is_timed(budget: Budget, most: int) -> None:
    def check(asked: Budget) -> None:
        prepared: Any = SimpleNamespace(generation=GENERATION, recipe=make_recipe(asked))
        check_context(prepared)

    check(replace(budget, prompt_tokens=most))
    with pytest.raises(InputError, match=f"budget.prompt_tokens is {most + 1}: .* context of {CONTEXT}"):
        check(replace(budget, prompt_tokens=most + 1))
    with pytest.raises(InputError, match="prompt_tokens is 128: so many"):
        check(budget)
