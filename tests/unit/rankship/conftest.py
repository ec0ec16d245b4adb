"""A small trained-looking net, its inputs, and a store of the tests' own."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from make.sessions import NET, make_net


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One store for all tests of these files, as a user's sessions share one."""
    folder = tmp_path_factory.getbasetemp() / "front-door-store"
    monkeypatch.setenv("RANKSHIP_STORE", str(folder))
    return folder


@pytest.fixture
def net_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """The class of a module file of the user's own, imported from the current folder."""
    (tmp_path / "user_net.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_net", raising=False)
    found: type[nn.Module] = importlib.import_module("user_net").Net
    return found


@pytest.fixture
def net() -> nn.Module:
    return make_net()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(80, 20, generator=torch.Generator().manual_seed(1))
