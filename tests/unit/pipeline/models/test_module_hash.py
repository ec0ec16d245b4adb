import copy
import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.module_hash import hash_module

HELPERS = "SCALE = {scale}\n\ndef double(x):\n    return {body}\n"
NET = """
import torch
from torch import nn
import {helpers} as tools
from {helpers} import double

class Net(nn.Module):
    def forward(self, x):
        return {call}
"""


class Leaky(nn.Module):
    """Computes with a number that its repr does not show."""

    def __init__(self, slope: object) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.slope = slope


def make_buffered(value: float) -> nn.Module:
    made = Leaky(0.0)
    made.register_buffer("scale", torch.tensor(value), persistent=False)
    return made


def make_hooked(value: float) -> nn.Module:
    made = Leaky(0.0)
    made.layer.register_forward_hook(lambda _layer, _x, y: y * value)
    return made


def make_typed(decorator: str, body: str) -> nn.Module:
    """A net of a class typed into a notebook, whose forward calls another method of its class."""
    scope: dict[str, Any] = {"nn": nn, "torch": torch, "__name__": "no_file"}
    text = f"class Typed(nn.Module):\n    {decorator}\n    def scale(*_):\n        return {body}\n"
    exec(text, scope)  # noqa: S102 - what a notebook does
    made: nn.Module = scope["Typed"]()
    return made


def make_calling(body: str) -> nn.Module:
    """A net whose forward calls a function of another cell."""
    scope: dict[str, Any] = {"nn": nn, "__name__": "no_file"}
    exec(f"def helper(x):\n    return {body}\n", scope)  # noqa: S102 - what a notebook does
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return helper(x)\n", scope)  # noqa: S102
    made: nn.Module = scope["Typed"]()
    return made


def make_cached(by: float) -> Callable[[], float]:
    @functools.cache
    def give() -> float:
        return by

    return give


@dataclass
class Settings:
    """An object that a module may hold."""

    slope: float


def scale(x: Tensor, by: float) -> Tensor:
    return x * by


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "number": (lambda: Leaky(0.01), lambda: Leaky(1.0)),
    "number in a mapping": (lambda: Leaky({"a": [1, (2, 3)]}), lambda: Leaky({"a": [1, (2, 4)]})),
    "tensor": (lambda: Leaky(torch.zeros(2)), lambda: Leaky(torch.ones(2))),
    "small float tensor": (
        lambda: Leaky(torch.zeros(2, dtype=torch.bfloat16)),
        lambda: Leaky(torch.ones(2, dtype=torch.bfloat16)),
    ),
    "function": (lambda: Leaky(torch.tanh), lambda: Leaky(torch.relu)),
    "partial": (lambda: Leaky(functools.partial(scale, by=1)), lambda: Leaky(functools.partial(scale, by=2))),
    "module": (lambda: Leaky(nn.Softmax(0)), lambda: Leaky(nn.Softmax(1))),
    "object of the user's": (lambda: Leaky(Settings(1)), lambda: Leaky(Settings(2))),
    "set": (lambda: Leaky({"a", "b"}), lambda: Leaky({"a", "c"})),
    "array": (lambda: Leaky(torch.zeros(2).numpy()), lambda: Leaky(torch.ones(2).numpy())),
    "cached function": (lambda: Leaky(make_cached(1)), lambda: Leaky(make_cached(2))),
    "module in a list": (lambda: Leaky([Leaky(1)]), lambda: Leaky([Leaky(2)])),
    "buffer that is not saved": (lambda: make_buffered(1), lambda: make_buffered(2)),
    "hook": (lambda: make_hooked(1), lambda: make_hooked(2)),
    "static method": (lambda: make_typed("@staticmethod", "1"), lambda: make_typed("@staticmethod", "2")),
    "class method": (lambda: make_typed("@classmethod", "1"), lambda: make_typed("@classmethod", "2")),
    "property": (lambda: make_typed("@property", "1"), lambda: make_typed("@property", "2")),
    "closure": (lambda: make_typed("@torch.no_grad()", "1"), lambda: make_typed("@torch.no_grad()", "2")),
    "helper": (lambda: make_calling("x"), lambda: make_calling("-x")),
    "order of inputs": (lambda: ByPosition(Leaky(0), ("a", "b")), lambda: ByPosition(Leaky(0), ("b", "a"))),
}


@pytest.mark.parametrize("what", PAIRS)
def test_what_decides_the_outputs_is_hashed(what: str) -> None:
    first, second = PAIRS[what]
    assert hash_module(first()) != hash_module(second())
    assert hash_module(first()) == hash_module(first())
    assert hash_module(first()) == hash_module(copy.deepcopy(first()))


def import_net(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, helpers: str) -> nn.Module:
    """A net of a file whose helpers lie in another file."""
    for name, text in (("hashed_helpers", helpers), ("hashed_net", NET.format(helpers="hashed_helpers", call=call))):
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    made: nn.Module = importlib.import_module("hashed_net").Net()
    return made


@pytest.mark.parametrize("call", ["double(x)", "tools.double(x)", "x * tools.SCALE"])
def test_what_another_file_defines_is_hashed_as_it_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    net = import_net(tmp_path, monkeypatch, call, HELPERS.format(scale=2, body="x * 2"))
    first = hash_module(net)
    (tmp_path / "hashed_helpers.py").write_text("an edit that this session does not run")
    assert hash_module(net) == first
    other = import_net(tmp_path, monkeypatch, call, HELPERS.format(scale=3.5, body="x + x + 1"))
    assert hash_module(other) != first
