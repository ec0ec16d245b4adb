"""A running text as windows of token numbers, each with the token that follows at every position."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.model_config import load_tokenizer, read_context, read_vocabulary
from rankship_pipeline.models.samples import Samples, find_path
from rankship_pipeline.models.text_file import READERS, read_texts
from rankship_pipeline.models.token_windows import check_tokens, read_beginning
from rankship_pipeline.recipe.choices import DataChoice, Recipe

WINDOW = 256  # tokens, unless the model takes fewer
WINDOWS = (64, 64)  # to calibrate and to test: 16,384 tokens each
_CHARACTERS = 2**24  # of a text of gigabytes, or for each token that is drawn:
_CHARACTERS_OF_A_TOKEN = 24


def open_running_text(recipe: Recipe, folder: Path) -> Samples:
    """The windows of `data.text`, each of `data.tokens` tokens; the last piece of the text that fills none is left out.

    The model's tokenizer numbers the text, of a long one the beginning; of a table's texts, each is followed by the
    token that ends one.
    """
    choice, source = recipe.data, recipe.models[0]
    tokenizer = load_tokenizer(source, folder)
    most = read_context(source, folder) or WINDOW
    length = choice.tokens or min(WINDOW, most)
    if length > most:
        raise InputError(
            f"data.tokens is {length}, model {source.name!r} takes at most {most}", hint=f"set tokens = {most} or less"
        )
    calibrating, testing = WINDOWS
    drawn = (choice.calibration_samples or calibrating) + (choice.test_samples or testing)
    most_characters = max(_CHARACTERS, _CHARACTERS_OF_A_TOKEN * length * drawn)
    tokens = _number(tokenizer, _read_documents(choice, folder, most_characters))
    check_tokens(tokens, read_vocabulary(source, folder), source.name)
    count = (len(tokens) - 1) // length  # every window's last position has a token after it
    if count < 1:
        raise InputError(
            f"{choice.origin} has {len(tokens)} tokens, a window takes {length + 1}",
            hint="give more text, or set fewer `tokens` in [data]",
        )
    taken = tokens[: count * length + 1]
    windows, following = taken[:-1].view(count, length), taken[1:].view(count, length)
    return Samples(count, None, partial(_pick_inputs, windows), partial(_pick, following), WINDOWS)


def _pick(rows: Tensor, chosen: Sequence[int]) -> Tensor:
    return rows[torch.tensor(chosen, dtype=torch.int64)]


def _pick_inputs(rows: Tensor, chosen: Sequence[int]) -> tuple[Tensor, ...]:
    return (_pick(rows, chosen),)


def _read_documents(choice: DataChoice, folder: Path, most_characters: int) -> list[str]:
    """The text of a file, of a long one the beginning; or the texts of a table."""
    path = find_path(choice.text or str(choice.csv), folder)
    if choice.csv is not None or path.suffix.lower() in READERS:
        return read_texts(choice, folder)[0]
    return [read_beginning(path, most_characters)]


def _number(tokenizer: Any, documents: Sequence[str]) -> Tensor:  # noqa: ANN401 - transformers has no types
    """The tokens of all texts, one after the other (tokens,), each ended where there are several.

    The first begins as the tokenizer begins texts; what ends a single text is left out.
    """
    end, found = tokenizer.eos_token_id, list[int]()
    for place, text in enumerate(documents):
        found += tokenizer(text, add_special_tokens=place == 0, verbose=False)["input_ids"]
        if end is not None and len(documents) > 1 and found[-1:] != [end]:
            found.append(end)
    if len(documents) == 1 and found[-1:] == [end]:
        found.pop()
    return torch.tensor(found, dtype=torch.int64)
