import argparse
import tomllib
from pathlib import Path

import pytest

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.recipe.budget import AMOUNTS
from rankship_pipeline.recipe.draft import (
    add_budget_flags,
    add_data_flags,
    name_models,
    place,
    take_budget,
    take_data,
    write_new,
    write_recipe,
)
from rankship_pipeline.recipe.rules import read_recipe


def read_flags(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_data_flags(parser)
    add_budget_flags(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize("key", AMOUNTS)
def test_every_amount_of_a_budget_is_a_flag(key: str, tmp_path: Path) -> None:
    share = key.startswith("kept_")
    budget = take_budget(read_flags(f"--{key.replace('_', '-')}", "0.25" if share else "9000"), tmp_path)
    assert budget == {key: 0.25 if share else 9000}


def test_half_of_the_parameters_is_the_default_and_kept_is_short_for_them(tmp_path: Path) -> None:
    assert take_budget(read_flags(), tmp_path) == {"kept_parameters": 0.5}
    assert take_budget(read_flags("--kept", "0.3"), tmp_path) == {"kept_parameters": 0.3}
    where = take_budget(read_flags("--latency-ms", "12", "--on", "pi4", "--costs", "/c.json"), tmp_path)
    assert where == {"latency_ms": 12, "costs": "/c.json", "on": "pi4"}
    asked = take_budget(read_flags("--token-ms", "4", "--prompt-tokens", "64", "--on", "pi4"), tmp_path)
    assert asked == {"token_ms": 4, "prompt_tokens": 64, "on": "pi4"}
    both = take_budget(read_flags("--token-ms", "4", "--time-to-first-token-ms", "90", "--on", "pi4"), tmp_path)
    assert both == {"time_to_first_token_ms": 90, "token_ms": 4, "on": "pi4"}
    with pytest.raises(InputError, match="two budgets: latency_ms and token_ms"):
        take_budget(read_flags("--token-ms", "4", "--latency-ms", "90", "--on", "pi4"), tmp_path)


def test_paths_are_written_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "net.py").touch()
    assert place("photos", Path("sub/out")) == "../../photos"
    assert place("net.py:make", Path("sub")) == "../net.py:make"
    assert place(str(tmp_path / "photos"), Path("sub")) == str(tmp_path / "photos")
    assert place("microsoft/resnet-18", Path("sub")) == "microsoft/resnet-18"
    assert take_data(read_flags("--images", "photos", "--size", "32"), Path("sub")) == {
        "images": "../photos",
        "size": 32,
    }
    assert take_data(read_flags(), Path("sub")) == {}


def test_models_are_named_by_their_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_models(["google/vit-base", "mine/vit-base", "a b/ünï ç", "."]) == [
        *("vit-base", "vit-base 2", "ünï-ç", tmp_path.name)
    ]


def test_a_written_recipe_reads_as_what_was_meant(tmp_path: Path) -> None:
    text = write_recipe(
        ["Two lines", "of comment"],
        'a "name"',
        {
            "models": [{"name": name, "huggingface": f"{name}\\x # ünï"} for name in "ab"],
            "data": {"csv": "t.csv", "columns": ["a", "b"], "label": "y"},
            "merge": {"method": "average"},
            "budget": {"kept_flops": 0.25},
            "export": {"formats": ["onnx"]},
        },
    )
    assert text.startswith("# Two lines\n# of comment\n")
    assert tomllib.loads(text)["name"] == 'a "name"'
    (tmp_path / "r.toml").write_text(text.replace('a \\"name\\"', "r"))
    recipe = read_recipe(tmp_path / "r.toml")
    assert [one.huggingface for one in recipe.models] == ["a\\x # ünï", "b\\x # ünï"]
    assert recipe.data.columns == ("a", "b")
    assert recipe.budget.kept_flops == 0.25
    assert recipe.merge.method == "average"


def test_no_file_is_overwritten_and_none_is_written_beside_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("mine")
    with pytest.raises(InputError, match="b is there already"):
        write_new({tmp_path / "a": "x", tmp_path / "b": "y"})
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b").read_text() == "mine"
    write_new({tmp_path / "sub/a": "x", tmp_path / "sub/c": b"\0"})
    assert (tmp_path / "sub/c").read_bytes() == b"\0"


def test_a_file_that_cannot_be_written_takes_the_others_with_it(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("a file, not a folder")
    with pytest.raises(InputError, match=r"cannot write .*b/c"):
        write_new({tmp_path / "a": "x", tmp_path / "b" / "c": "y"})
    assert not (tmp_path / "a").exists()
