import sys
from pathlib import Path

import pytest

from rankship_pipeline.models.opened import open_source
from rankship_pipeline.models.recipe_imports import list_imported
from rankship_pipeline.models.source import load_function
from rankship_pipeline.recipe.choices import Source

NET = """
from torch import nn
from beside_width import WIDTH

def make():
    from beside_depth import DEPTH
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))

def tell():
    from beside_depth import DEPTH
    return WIDTH, DEPTH
"""


def write(folder: Path, width: int = 3, depth: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(NET)
    (folder / "beside_width.py").write_text(f"{'#' * width}\nWIDTH = {width}\n")
    (folder / "beside_depth.py").write_text(f"{'#' * depth}\nDEPTH = {depth}\n")
    return folder


def test_an_edited_file_is_what_runs(tmp_path: Path) -> None:
    assert load_function("net.py:tell", write(tmp_path))() == (3, 1)
    assert load_function("net.py:tell", write(tmp_path, width=5))() == (5, 1)
    assert load_function("net.py:tell", write(tmp_path, width=5, depth=2))() == (5, 2)


def test_an_edited_file_that_the_session_imported_itself_is_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(write(tmp_path)))
    __import__("beside_width")
    assert load_function("net.py:tell", write(tmp_path, width=5))() == (5, 1)


def test_recipes_in_two_folders_run_the_files_of_their_own(tmp_path: Path) -> None:
    first, second = (
        load_function("net.py:tell", write(tmp_path / name, width, width)) for name, width in (("a", 3), ("b", 5))
    )
    assert (first(), second(), first()) == ((3, 3), (5, 5), (3, 3))
    assert sys.path.count(str(tmp_path / "a")) == 1
    assert str(tmp_path / "b") not in sys.path


def test_a_file_that_did_not_change_is_imported_once(tmp_path: Path) -> None:
    load_function("net.py:tell", write(tmp_path))()
    kept = sys.modules["beside_width"]
    load_function("net.py:tell", tmp_path)()
    assert sys.modules["beside_width"] is kept


def test_a_module_of_the_session_that_a_recipe_does_not_import_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(write(tmp_path)))
    (tmp_path / "beside_other.py").write_text("")
    mine = __import__("beside_other")
    load_function("net.py:tell", tmp_path)()
    assert sys.modules["beside_other"] is mine


@pytest.mark.parametrize("changed", ["width", "depth"])
def test_the_hash_follows_every_file_that_a_factory_imports(tmp_path: Path, changed: str) -> None:
    source = Source(name="a", factory="net.py:make", train="net.py:tell")
    first = open_source(source, write(tmp_path), 0).sha256
    write(tmp_path, **{changed: 7})
    second = open_source(source, tmp_path, 0).sha256
    assert second != first
    (tmp_path / "unrelated.py").write_text("")
    assert open_source(source, tmp_path, 0).sha256 == second


def test_imports_are_followed_through_packages(tmp_path: Path) -> None:
    package = tmp_path / "nets" / "small"
    package.mkdir(parents=True)
    texts = {
        "net.py": "import nets.small.one as it, json\nimport importlib\nimportlib.import_module('late')\n",
        "late.py": "",
        "nets/__init__.py": "",
        "nets/top.py": "",
        "nets/small/one.py": "from . import two\nfrom ..top import x\nfrom .gone import y",
        "nets/small/two.py": "from late import (a, b)",
        "nets/small/three.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    found = [path.relative_to(tmp_path).as_posix() for path in list_imported([tmp_path / "net.py"], tmp_path)]
    assert found == ["late.py", "nets/__init__.py", "nets/small/one.py", "nets/small/two.py", "nets/top.py"]
