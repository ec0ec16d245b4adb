"""A whole session over adb: the phone's kit installed, its Python started there, the agent asked what it finds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rankship_targets.adb import open_adb
from rankship_targets.device import Device
from rankship_targets.session import open_session

pytestmark = [pytest.mark.twin, pytest.mark.slow]


@pytest.fixture(scope="module")
def phone_with_python(pixel: Device, tmp_path_factory: pytest.TempPathFactory) -> Device:
    build: Any = pytest.importorskip("rankship_targets.kit.build", reason="no kits here")
    install: Any = pytest.importorskip("rankship_targets.kit.install", reason="no kits here")
    system: Any = pytest.importorskip("rankship_targets.kit.system", reason="no kits here")
    device = replace(pixel, workdir="/data/local/tmp/rankship")
    with pytest.MonkeyPatch.context() as patch, open_adb(device) as transport:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        lock, folder = build.build_kit(system.ask_system(transport, device), device.name, ["onnx"], lambda _: None)
        installed = install.install_kit(transport, device, lock, folder, lambda _: None)
    return replace(device, python=installed.python)


def test_the_agent_probes_the_phone(phone_with_python: Device) -> None:
    with open_session(phone_with_python) as session:
        probe = session.probe()
    assert (probe.machine, probe.cpu_count) == ("aarch64", 8)
    assert probe.runtimes["onnx"] is not None
    assert probe.state.temperature_mc == 41_200
    assert probe.state.governor == "sched_pixel"


def test_a_file_pushed_in_a_session_is_there_whole(phone_with_python: Device, tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    (tmp_path / "file.npy").write_bytes(content)
    with open_session(phone_with_python) as session:
        remote = session.push_file(tmp_path / "file.npy")
    with open_adb(phone_with_python) as transport:
        transport.fetch(remote, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
