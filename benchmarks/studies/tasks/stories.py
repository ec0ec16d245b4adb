"""Two zero-shot tasks from a file of small stories: which sentence ends a story, and which word.

The stories of RANKSHIP_DATA are of TinyStories' training part, so that a model trained on it may have seen them: what a
compressed model loses against the dense one is the finding, not the score itself.
"""

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError

SEPARATOR = "<|endoftext|>"
OTHERS = 3  # wrong endings beside the true one
_ENDING = re.compile(r'(?P<story>.*[.!?]["”]?) (?P<ending>[A-Z"“][^.!?\n]*[.!?]["”]?)', re.DOTALL)
_LAST_WORD = re.compile(r"(?P<story>.+) (?P<word>[A-Za-z]{3,})[.!?]", re.DOTALL)
_ENDING_WORDS = range(4, 26)


def write_tasks(stories: Path, folder: Path, *, first: int = 0, stop: int | None = None, seed: int = 0) -> None:
    """Write `story_endings` and `story_words` into `folder`: the .yaml files beside this one and a .jsonl for each.

    Uses the stories first … stop - 1 of the file, in its order; calibrate and train on others. The same file and seed
    give the same bytes. Raises InputError where the stories are missing or give fewer than four different endings.
    """
    if not stories.is_file():
        raise InputError(f"there is no {stories}", hint="give a text file of stories, parted by <|endoftext|>")
    parts = [part.strip() for part in stories.read_text(encoding="utf-8").split(SEPARATOR)]
    chosen = list(enumerate(part for part in parts if part))[first:stop]
    endings = list(_make_endings(chosen, random.Random(seed)))  # noqa: S311 - nothing secret
    tasks = {"story_endings": endings, "story_words": list(_make_words(chosen))}
    if lacking := [name for name, documents in tasks.items() if not documents]:
        raise InputError(
            f"{stories}: {len(chosen)} stories from number {first} on give no document for {', '.join(lacking)}",
            hint="take more stories",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in tasks.items():
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name(f"{name}.yaml"), folder / f"{name}.yaml")


def _make_endings(stories: list[tuple[int, str]], chance: random.Random) -> Iterator[dict[str, object]]:
    """Stories whose last sentence follows another on the same line, with three of the others' last sentences."""
    found = [(number, match) for number, story in stories if (match := _ENDING.fullmatch(story))]
    found = [(number, match) for number, match in found if len(match["ending"].split()) in _ENDING_WORDS]
    known = sorted({match["ending"] for _, match in found})
    if len(known) <= OTHERS:
        return
    for number, match in found:
        endings = chance.sample([ending for ending in known if ending != match["ending"]], OTHERS)
        answer = chance.randrange(OTHERS + 1)
        endings.insert(answer, match["ending"])
        yield {"number": number, "story": match["story"], "endings": endings, "answer": answer}


def _make_words(stories: list[tuple[int, str]]) -> Iterator[dict[str, object]]:
    """Stories whose last word stands in them before, as LAMBADA's targets do; the story without it, and the word."""
    for number, story in stories:
        match = _LAST_WORD.fullmatch(story)
        if match and re.search(rf"\b{match['word']}\b", match["story"], re.IGNORECASE):
            yield {"number": number, "story": match["story"], "word": match["word"]}
