"""The command that the refusal of a pickle prints: it is run as printed, and the new file holds the weights."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.pickled import describe_pickle, list_classes
from rankship_pipeline.models.weights import State, read_state

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
STATE: State = dict(NET.state_dict())

# what was saved → words of the message
SAVED: dict[str, tuple[object, str]] = {
    "plain": (STATE, "when it is read$"),
    "training": ({"epoch": 3, "state_dict": STATE, "optimizer": {"state": {}}}, "its weights lie under state_dict"),
    "deep": ({"epoch": 3, "parts": {"net": STATE, "step": 2}}, r"its weights lie under parts\.net"),
    "tied": ({**STATE, "again": STATE["0.weight"]}, "when it is read$"),
    "arguments": ({"model": STATE, "args": argparse.Namespace(lr=0.1)}, r"more than tensors \(argparse\.Namespace\)"),
    "module": (NET, r"more than tensors \("),
}


def take_command(path: Path) -> list[str]:
    """The words of the printed command, as a shell reads them."""
    with pytest.raises(InputError, match="is a pickle") as caught:
        read_state(path)
    return shlex.split(caught.value.hint[caught.value.hint.index("python -c") :])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the command's process ends, ours stays
@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("kind", SAVED)
def test_the_message_says_where_the_weights_lie_and_its_python_finds_them(
    kind: str, tmp_path: Path, *, as_zip: bool
) -> None:
    what, words = SAVED[kind]
    torch.save(what, tmp_path / "net.safetensors", _use_new_zipfile_serialization=as_zip)  # a name that misleads
    assert re.search(words, describe_pickle(tmp_path / "net.safetensors")[0])
    exec(take_command(tmp_path / "net.safetensors")[2], {})  # noqa: S102 - the printed Python
    found = read_state(tmp_path / "net-converted.safetensors")
    assert all(torch.equal(found[name], value) for name, value in STATE.items())


def test_the_printed_command_works_in_a_shell_whatever_the_path(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a "folder" $HOME'
    folder.mkdir()
    torch.save(SAVED["training"][0], folder / "my net.pth")
    words = take_command(folder / "my net.pth")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(words, check=True, env={**os.environ, "PATH": path})
    assert read_state(folder / "my net.safetensors").keys() == STATE.keys()


def test_a_script_is_converted_too_and_nothing_is_written_over(tmp_path: Path) -> None:
    script: Callable[..., torch.jit.ScriptModule] = torch.jit.script
    script(NET).save(str(tmp_path / "net.pt"))
    (tmp_path / "net.safetensors").write_bytes(b"mine")
    _, hint = describe_pickle(tmp_path / "net.pt")
    assert "torch.jit.load" in hint
    assert "net-converted.safetensors" in hint


def test_classes_are_listed_without_being_called(tmp_path: Path) -> None:
    torch.save({"a": argparse.Namespace(b=1), "w": torch.ones(2)}, tmp_path / "x.pth")
    assert list_classes(tmp_path / "x.pth") == ["argparse.Namespace"]
    (tmp_path / "y.pth").write_bytes(b"\x80")
    assert list_classes(tmp_path / "y.pth") == []
