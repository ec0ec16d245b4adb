"""A recipe of seconds: two tiny specialists with weights on disk, three formats, every stage real."""

import sys
from pathlib import Path

import pytest

from make.recipes import write_tiny_recipe
from make.ssh_servers import SshServer
from rankship_targets.devices.inventory import Value, add_device


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path / "recipe")


@pytest.fixture(scope="session")
def shared_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that only read it, so that they share one store."""
    return write_tiny_recipe(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def inventory(ssh_server: SshServer, tmp_path: Path) -> Path:
    """Two boards behind one server, each with a folder of its own whose name needs quoting."""
    board = ssh_server.device
    table: dict[str, Value] = {"transport": "ssh", "host": "127.0.0.1", "port": board.port, "user": board.user or ""}
    table |= {"host_key": board.host_key or "", "key_file": board.key_file or ""}
    for name in ("one", "two"):
        workdir = str(tmp_path / f"it's {name}")
        add_device(tmp_path / "devices.toml", name, {**table, "python": sys.executable, "workdir": workdir})
    return tmp_path / "devices.toml"
