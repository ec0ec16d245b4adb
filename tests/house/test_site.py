"""The site holds every page, command and key; the house is drawn as it stands."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from rankship_benchmarks.bundle.suite import Suite
from rankship_pipeline.cli import VERBS
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import Comparison, Recipe
from rankship_pipeline.recipe.merge_methods import METHODS
from rankship_targets.devices.device import Device
from rankship_targets.devices.meter_choice import TableColumns

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import generated  # noqa: E402  # the site's own extensions, found by the path above

import house  # noqa: E402

SPEAKING = {TableColumns, Comparison}  # their keys say what they are, or are those of other tables


def test_every_page_stands_in_the_contents() -> None:
    contents = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)
    listed = {line for block in contents for line in block.splitlines() if line and not line.startswith(":")}
    assert listed == {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}


def test_the_references_hold_every_command_and_every_key() -> None:
    commands = generated.write_commands()
    assert all(f"### `rankship {verb}`" in commands for verb in VERBS)
    assert "### `rankship devices add`" in commands
    assert "/root" not in commands
    assert str(Path.home()) not in commands
    recipe = generated.PARTS["recipe"]()
    for table in ("[[models]]", "[data]", "[merge]", "[budget]", "[ranks]", "[factorise]", "[[compare]]", "[refine]"):
        assert f"### `{table}`" in recipe
    for field in fields(Budget):
        assert f"| `{field.name}` |" in recipe


@pytest.mark.parametrize("root", [Recipe, Suite, Device])
def test_every_key_has_its_meaning(root: type) -> None:
    records, waiting = set(), [root]
    while waiting:
        record = waiting.pop()
        records.add(record)
        hints = get_type_hints(record).values()
        waiting += [found for hint in hints if (found := generated.find_record(hint)) and found not in records]
    for record in records - SPEAKING:
        assert set(generated.split_docstring(record)[1]) == {field.name for field in fields(record)}, record.__name__


def test_the_page_on_merging_has_every_method_with_its_keys() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", (ROOT / "docs/merging.md").read_text(), re.MULTILINE
    )
    assert {name: set(re.findall(r"`(\w+)`", keys)) for name, _, keys in rows} == {
        name: set(needs.defaults) for name, needs in METHODS.items()
    }
    assert {name: needs.strip() == "base" for name, needs, _ in rows} == {
        name: one.base for name, one in METHODS.items()
    }


def test_the_house_is_drawn_as_it_stands() -> None:
    assert house.draw() in (ROOT / "CONTRIBUTING.md").read_text(), "run `python docs/house.py`"


def test_every_folder_stands_in_the_house() -> None:
    unseen = {"build", "dist", "rankship-results", "rankship-nightly", "__pycache__"}
    tops = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in unseen]
    assert {top.name for top in tops} == {name for name in house.FOLDERS if "/" not in name}
    folders = {
        str(folder.relative_to(ROOT))
        for top in tops
        if top.name not in {"docs", "docker"}
        for folder in set(top.iterdir()) - set(house.list_packages(top))
        if folder.is_dir() and any(path.suffix in {".py", ".toml", ".json"} for path in folder.rglob("*"))
    }
    assert folders == {name for name in house.FOLDERS if "/" in name}


@pytest.mark.parametrize("top", ["pipeline", "targets", "benchmarks"])
def test_every_folder_of_modules_is_a_room(top: str) -> None:
    for package in house.list_packages(ROOT / top):
        folders = {path.parent for path in package.rglob("*.py")} - {package}
        assert folders == set(house.list_rooms(package)), "a folder of modules without __init__.py"
        assert all(len(house.describe(folder)) > len("A room.") for folder in folders)


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    strict = ("--fail-on-warning", "--keep-going", "--quiet", "--doctree-dir", str(tmp_path / "read"))
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *strict, str(ROOT / "docs"), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {page.stem: page.read_text() for page in (tmp_path / "site").glob("*.html")}
    fetched = r"""<(?:script|img|iframe)[^>]+src=["']?(?:https?:)?//|<link[^>]+rel="(?:stylesheet|preload)"[^>]+//"""
    assert [name for name, text in pages.items() if re.search(fetched, text)] == []
    assert [name for name, text in pages.items() if "{{ generated" in text] == []
    assert "rankship devices add" in pages["commands"]
    assert "kept_parameters" in pages["recipes"]
    assert "rankship.compress" in pages["api"]
