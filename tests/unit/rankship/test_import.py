import inspect
import subprocess
import sys

import pytest

import rankship as rs

HEAVY = {"torch", "numpy", "scipy", "pydantic", "rich", "matplotlib", "onnxruntime", "tomlkit", "paramiko"}


def test_the_import_and_a_recipe_load_nothing_heavy() -> None:
    code = (
        "import sys, rankship as rs\nrs.Recipe(name='a', models=(), data=rs.DataChoice(loader='a.py:b'))\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & HEAVY == set()
    assert "rankship" in done.stdout.split()


@pytest.mark.parametrize("name", rs.__all__)
def test_every_name_that_is_offered_is_there(name: str) -> None:
    assert getattr(rs, name) is not None
    assert name in dir(rs)


def test_a_function_keeps_its_name_once_its_module_is_loaded() -> None:
    for name in ("compress", "merge", "export", "measure", "load", "run", "stream"):
        assert inspect.isfunction(getattr(rs, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'rankship' has no attribute 'comprss'"):
        _ = rs.comprss


@pytest.mark.parametrize("name", ["compress", "merge", "export", "measure", "load", "run", "stream"])
def test_every_function_says_what_it_takes_raises_and_shows_an_example(name: str) -> None:
    function = getattr(rs, name)
    text = inspect.getdoc(function) or ""
    for heading in ("Args:", "Raises:", "Example:"):
        assert heading in text
    said = text.partition("Args:")[2].partition("Raises:")[0]
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}: " in said, parameter
