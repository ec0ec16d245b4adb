"""The cache of what stand-ins are made from: made once, whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from rankship_targets.twin.cache import find_or_make


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


class Maker:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "deep").mkdir()
        (folder / "deep/file").write_text("content")
        (folder / "link").symlink_to("deep/file")


def test_it_is_made_once_and_found_ever_after() -> None:
    make = Maker()
    first = find_or_make("thing", "recipe", make)
    assert find_or_make("thing", "recipe", make) == first
    assert make.times == 1
    assert find_or_make("thing", "another recipe", make) != first


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "deep/file").unlink(),
        lambda folder: (folder / "deep/file").write_text("cont"),
        lambda folder: (folder / "link").unlink(),
        lambda folder: (folder / "made.json").write_text("{"),
        lambda folder: (folder / "deep/more").touch(),
    ],
)
def test_a_damaged_one_is_made_anew(damage: object) -> None:
    make = Maker()
    folder = find_or_make("thing", "recipe", make)
    assert callable(damage)
    damage(folder)
    assert (find_or_make("thing", "recipe", make) / "deep/file").read_text() == "content"
    assert make.times == 2
    assert not (folder / "deep/more").exists()


def test_a_maker_that_fails_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        find_or_make("thing", "recipe", fail)
    assert [path.suffix for path in (cache / "rankship/twins").iterdir()] == [".lock"]


def test_what_a_killed_maker_left_is_removed(cache: Path) -> None:
    kill = "import os; from rankship_targets.twin.cache import find_or_make as find; "
    kill += "find('a', 'b', lambda _: os.kill(os.getpid(), 9))"
    assert subprocess.run([sys.executable, "-c", kill], check=False).returncode == -9
    assert len(list((cache / "rankship/twins").glob(".*.tmp"))) == 1
    find_or_make("a", "b", Maker())
    assert not list((cache / "rankship/twins").glob(".*.tmp"))


def test_of_two_processes_one_makes_it() -> None:
    code = (
        "import time; from rankship_targets.twin.cache import find_or_make\n"
        "def make(folder):\n    (folder / 'made').touch(); print('making', flush=True); time.sleep(0.5)\n"
        "print(find_or_make('a', 'b', make).name)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].split() for process in both]
    assert sorted(len(words) for words in said) == [1, 2]
    assert said[0][-1] == said[1][-1]
