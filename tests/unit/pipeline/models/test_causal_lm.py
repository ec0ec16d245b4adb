import json
from pathlib import Path

import pytest

from make.writers import save_writer
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.causal_lm import describe_generation
from rankship_pipeline.recipe.choices import Source

SOURCE = Source(name="m", huggingface="writer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_writer(tmp_path / "writer")
    return tmp_path


def tell(folder: Path, **told: object) -> None:
    (folder / "writer/generation_config.json").write_text(json.dumps(told))


def test_a_models_files_say_how_a_text_begins_and_ends(folder: Path) -> None:
    found = describe_generation(SOURCE, folder, None)
    assert (found.context, found.vocabulary, found.begin, found.ends) == (48, 18, 0, (1,))
    assert found.prompt_tokens == 16
    tell(folder, bos_token_id=3, eos_token_id=[4, 5])
    found = describe_generation(SOURCE, folder, 20)
    assert (found.context, found.begin, found.ends, found.prompt_tokens) == (20, 3, (4, 5), 10)
    tell(folder, bos_token_id=None, eos_token_id=None)
    assert describe_generation(SOURCE, folder, 20).ends == ()


@pytest.mark.parametrize("context", [3, 49])
def test_a_context_that_the_model_does_not_take_is_refused(folder: Path, context: int) -> None:
    with pytest.raises(InputError, match=f"export.context is {context}, model 'm' takes 4 to 48 tokens"):
        describe_generation(SOURCE, folder, context)


def test_proofs_reach_from_one_token_to_the_last_place(folder: Path) -> None:
    first, single, last = describe_generation(SOURCE, folder, None).proofs
    assert (first.tokens, first.prompt_tokens) == (48, 16)
    assert single.prompt_tokens == 1
    assert (last.tokens, last.prompt_tokens) == (48, 47)
