"""A board whose system is of 32 bits: Debian's own ARM interpreter behind a real SSH server."""

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from rankship_pipeline.foundation.errors import BuildError, WrongSystem
from rankship_targets.devices.device import Device
from rankship_targets.enrol.doctor import examine
from rankship_targets.kit.build import build_kit
from rankship_targets.kit.debian import unpack_packages
from rankship_targets.kit.system import ask_system
from rankship_targets.session.session import open_session
from rankship_targets.transport.ssh.connection import open_ssh

EMULATOR = "qemu-arm-static"
pytestmark = [
    pytest.mark.twin,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"no {EMULATOR}: apt-get install qemu-user-static"),
    pytest.mark.skipif(not shutil.which("apt-get"), reason="the interpreter comes from Debian's packages"),
]


@pytest.fixture(scope="module")
def old_board(start_sshd: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> Device:
    """A board that runs its Python as a Raspberry Pi with a 32-bit card does."""
    folder = tmp_path_factory.mktemp("armel")
    try:
        unpack_packages(["python3"], "armel", folder / "apt", folder / "root")
    except BuildError as failure:
        pytest.skip(f"no packages of 32-bit ARM: {failure}")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {EMULATOR} -L {folder}/root {folder}/root/usr/bin/python3 "$@"\n')
    python.chmod(0o755)
    server = start_sshd()
    device: Device = server.device  # type: ignore[attr-defined]
    return replace(device, name="old-pi", python=str(python), workdir=str(folder / "work"))


def test_no_kit_is_built_for_it(old_board: Device) -> None:
    with open_ssh(old_board) as transport, pytest.raises(WrongSystem, match="32-bit Python on armv7l") as refused:
        build_kit(ask_system(transport, old_board), "old-pi", ["onnx"], lambda _: None)
    assert "64-bit edition" in refused.value.hint


def test_doctor_says_what_to_do(old_board: Device) -> None:
    with open_session(old_board) as session:
        probe = session.probe()
    found = {check.name: check for check in examine(old_board, probe)}
    assert (found["system"].verdict, found["onnx"].verdict) == ("fail", "fail")
    assert "32-bit userland" in found["system"].finding
    assert "64-bit" in found["system"].advice
