"""What the documents say of commands, paths, keys and code is true."""

import ast
import doctest
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from rankship_benchmarks.bundle.suite import Suite
from rankship_pipeline.cli import VERBS
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.recipe.choices import Recipe
from rankship_pipeline.recipe.merge_file import MergeFile
from rankship_targets.devices.meter_choice import MeterChoice

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import generated  # noqa: E402  # the site's own extension, found by the path above

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docker/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PACKAGES = ("pipeline/rankship_pipeline", "targets/rankship_targets", "benchmarks/rankship_benchmarks")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SUFFIXES = ("py", "toml", "md", "json", "j2", "c", "txt")
# What the words of a command may be in front of, or stand in: `$NAME=… rankship`, `cd … && rankship`.
COMMAND = re.compile(r"(?<![\w/.-])(rankship|make)((?: [^\s`#;|>]+)+)")
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def list_blocks(document: Path, language: str) -> list[str]:
    return [block for name, block in FENCE.findall(document.read_text()) if name == language]


def list_code(document: Path) -> Iterator[str]:
    """Every fenced line but Python's, and every `span` of code, a span that wraps put together."""
    text = document.read_text()
    for language, block in FENCE.findall(text):
        yield from block.splitlines() if language != "python" else ()
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        yield re.sub(r"\s+", " ", span)


def list_commands(document: Path) -> list[list[str]]:
    return [
        [program, *(word.strip("[]()\"'") for word in rest.split())]
        for code in list_code(document)
        for program, rest in COMMAND.findall(code)
    ]


def find_complaint(words: list[str]) -> str | None:
    """What is wrong with a `rankship` command: its verb, what the verb divides into, or a flag."""
    verb, *rest = words[1:]
    if verb in {"VERB", "--help", "--version"}:
        return None
    if verb not in VERBS:
        return f"no verb {verb!r}"
    named = (verb, rest[0]) if rest and (verb, rest[0]) in set(generated.list_commands()) else (verb,)
    known = set(re.findall(r"--[\w-]+", generated.read_help(*named)))
    flags = [word.split("=")[0] for word in rest if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in known]
    return f"{' '.join(named)} knows no {unknown}" if unknown else None


@pytest.mark.parametrize(
    ("command", "good"),
    [
        ("rankship run RECIPE --on pi4", True),
        ("rankship devices add pi4 --twin pi4", True),
        ("rankship runs RECIPE", False),
        ("rankship run RECIPE --at pi4", False),
        ("rankship devices remove pi4 --twin pi4", False),
    ],
)
def test_a_wrong_command_is_found(command: str, good: bool) -> None:  # noqa: FBT001  # a parameter of the table above
    assert (find_complaint(command.split()) is None) is good


@each_document
def test_every_command_parses(document: Path) -> None:
    commands = [words for words in list_commands(document) if words[0] == "rankship"]
    assert {" ".join(words): said for words in commands if (said := find_complaint(words))} == {}


@each_document
def test_every_make_target_exists(document: Path) -> None:
    targets = {words[1] for words in list_commands(document) if words[0] == "make"}
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets - known == set()


def test_the_documents_hold_commands() -> None:
    commands = [words for document in DOCUMENTS for words in list_commands(document)]
    assert len(commands) > 60
    assert {words[1] for words in commands} >= {"run", "demo", "kit", "nightly"}


@each_document
def test_every_path_exists(document: Path) -> None:
    tops = {path.name for path in ROOT.iterdir()}
    rooms = {path.name for package in PACKAGES for path in (ROOT / package).iterdir() if path.is_dir()}
    missing = []
    for code in list_code(document):
        for path in re.findall(rf"(?<![\w~./<$-])([\w.-]+(?:/[\w.-]+)+(?:\.(?:{'|'.join(SUFFIXES)})\b|/))", code):
            top = path.partition("/")[0]
            places = [ROOT / path] if top in tops else [ROOT / package / path for package in PACKAGES]
            if (top in tops - {"build", "dist", ".venv"} or top in rooms) and not any(
                place.exists() for place in places
            ):
                missing.append(path)
    assert missing == []


@each_document
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not link.startswith(("http", "#")):
            assert (document.parent / link.partition("#")[0]).exists(), link


@each_document
def test_python_blocks_compile_and_examples_run(document: Path) -> None:
    for block in list_blocks(document, "python"):
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, {}, document.name, str(document), 0)
            assert doctest.DocTestRunner().run(test).failed == 0
        else:
            ast.parse(block)


# What a block of TOML may be a part of, and what the rest of it would have to hold.
WHOLES: dict[type, dict[str, object]] = {
    Recipe: {"name": "x", "models": [{"name": "a"}], "data": {"loader": "x"}},
    Suite: {"recipe": "x"},
    MergeFile: {},
}


@each_document
def test_toml_blocks_hold_known_keys(document: Path) -> None:
    for block in list_blocks(document, "toml"):
        tables = tomllib.loads(block)
        if all(isinstance(one, dict) and one.keys() <= {"meter"} for one in tables.values()):  # [pi4.meter]
            decode(MeterChoice, json.dumps(next(iter(tables.values()))["meter"]), where=document.name)
            continue
        (whole,) = [kind for kind in WHOLES if tables.keys() <= {field.name for field in fields(kind)}][:1]
        models = [{"name": "a"} | one for one in tables.get("models", []) if isinstance(one, dict)]
        given = WHOLES[whole] | tables | ({"models": models} if models else {})
        decode(whole, json.dumps(given), where=document.name)


def test_the_readme_starts_with_the_two_commands() -> None:
    commands = [line.split()[:2] for line in "\n".join(list_blocks(ROOT / "README.md", "sh")).splitlines()]
    assert commands[:2] == [["make", "demo"], ["make", "test"]]
    assert len((ROOT / "README.md").read_bytes()) <= 7 * 1024
