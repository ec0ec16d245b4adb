"""Kits: what fits which device, and installing one on this machine as if it were a board; no test asks an index."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rankship_pipeline.foundation.errors import (
    BuildError,
    CommandFailed,
    InputError,
    Lacks,
    NoSpace,
    TargetBusy,
    WrongSystem,
)
from rankship_targets.devices.device import Device, load_inventory
from rankship_targets.kit import compile as compiling
from rankship_targets.kit import install, wheels
from rankship_targets.kit.install import Installed, install_kit
from rankship_targets.kit.lock import KitLock, describe_file, find_kit, keep_kit
from rankship_targets.kit.system import Board, Phone, ask_board, ask_system, judge_board
from rankship_targets.transport.fake import COMMANDS, FakeTransport
from rankship_targets.transport.lease import Lease, describe_owner
from rankship_targets.transport.local import LocalTransport
from rankship_targets.transport.protocol import Completed
from rankship_targets.verbs.kit import kit

PI = {"machine": "aarch64", "bits": 64, "libc": "glibc 2.36", "python": [3, 11], "implementation": "cpython"}


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(name="here", transport="local", python=sys.executable, workdir=str(tmp_path / "a 'device'"))


def write_wheel(folder: Path, name: str, modules: Mapping[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for module, text in modules.items():
            archive.writestr(module, text)
    return path


def make_kit(folder: Path, wheels: Sequence[Path], **changes: Any) -> KitLock:  # noqa: ANN401 - any field
    with LocalTransport() as transport:
        system, _ = ask_board(transport, Device(name="here", transport="local", python=sys.executable))
    lock = KitLock(system=system, runtimes={}, files=tuple(map(describe_file, wheels)))
    assert all(path.parent == folder for path in wheels)
    return replace(lock, **changes)


def put(device: Device, lock: KitLock, folder: Path) -> Installed:
    with LocalTransport() as transport:
        return install_kit(transport, device, lock, folder, quiet)


def test_a_pi_gets_the_wheels_of_its_own_python_and_c_library() -> None:
    board = judge_board("pi4", PI)
    assert board == Board(machine="aarch64", python=(3, 11), glibc=(2, 36))
    platforms = wheels.list_platforms(board)
    assert platforms[0] == "manylinux_2_36_aarch64"
    assert {"manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"} <= set(platforms)
    assert "manylinux_2_39_aarch64" not in platforms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 32}, "32-bit Python on aarch64"),
        ({"bits": 32, "machine": "armv7l"}, "32-bit Python on armv7l"),
        ({"machine": "riscv64"}, "riscv64"),
        ({"libc": None}, "no glibc"),
        ({"libc": "musl 1.2"}, "no glibc"),
        ({"libc": "glibc 2.24"}, "glibc 2.24"),
        ({"implementation": "cpythont"}, "cpythont"),
        ({"implementation": "pypy"}, "pypy"),
    ],
)
def test_a_system_that_no_runtime_is_published_for_is_refused_with_advice(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(WrongSystem, match=message) as caught:
        judge_board("pi4", {**PI, **change})
    assert caught.value.hint


@pytest.mark.parametrize(("abi", "fits"), [("arm64-v8a\n", True), ("armeabi-v7a\n", False), ("x86_64\n", False)])
def test_a_phone_is_judged_by_its_abi(abi: str, fits: bool) -> None:  # noqa: FBT001 - a parameter of the test
    phone = FakeTransport({"getprop": lambda _, __: Completed(code=0, stdout=abi, stderr="")})
    device = Device(name="pixel6", transport="adb", serial="1")
    if fits:
        assert ask_system(phone, device) == Phone()
    else:
        with pytest.raises(WrongSystem, match=abi.strip()):
            ask_system(phone, device)


def test_a_device_without_python_is_lacking(device: Device) -> None:
    with pytest.raises(Lacks, match="cannot start"):
        ask_board(FakeTransport(), device)


def test_a_deleted_kit_does_not_keep_the_device_from_being_asked(device: Device) -> None:
    with LocalTransport() as transport:
        board, interpreter = ask_board(transport, replace(device, python="/gone/bin/python"))
    assert board.machine == os.uname().machine
    assert Path(interpreter).is_file()


def test_the_lock_names_the_kit_and_any_change_renames_it(tmp_path: Path) -> None:
    first = make_kit(tmp_path / "k", [write_wheel(tmp_path / "k", "thing", {"thing.py": "x = 1"})])
    again = make_kit(tmp_path / "k", [tmp_path / "k/thing-1.0-py3-none-any.whl"])
    other = make_kit(tmp_path / "k", [write_wheel(tmp_path / "k", "thing", {"thing.py": "x = 2"})])
    assert first.name == again.name != other.name


def test_a_kept_kit_is_found_again_and_none_is_said_to_be_built(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no kit was built for here") as caught:
        find_kit("here")
    assert "rankship kit build here" in caught.value.hint
    lock = make_kit(tmp_path / "k", [write_wheel(tmp_path / "k", "thing", {"thing.py": ""})])
    home = keep_kit(lock, tmp_path / "k", "here")
    assert find_kit("here") == (lock, home)
    assert [path.name for path in home.glob("*.whl")] == ["thing-1.0-py3-none-any.whl"]
    phone = replace(lock, system=Phone())
    write_wheel(tmp_path / "k", "thing", {"thing.py": ""})
    keep_kit(phone, tmp_path / "k", "pixel6")
    assert find_kit("pixel6")[0] == phone


def test_an_installed_kit_runs_and_a_second_time_nothing_is_sent(device: Device, tmp_path: Path) -> None:
    folder = tmp_path / "k"
    lock = make_kit(
        folder, [write_wheel(folder, "thing", {"thing.py": "value = 7", "thing-1.0.dist-info/METADATA": ""})]
    )
    done = put(device, lock, folder)
    assert done.sent_bytes > 0
    said = subprocess.run(
        [done.python, "-c", "import sys, thing; print(thing.value, *sys.argv[1:])", "a b", "$c"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "7 a b $c\n"
    for path in folder.iterdir():
        path.unlink()  # what must not be sent need not be there
    assert put(device, lock, folder) == Installed(python=done.python, sent_bytes=0, was_there=True)
    kits = Path(device.workdir) / "kits"
    assert sorted(path.name for path in kits.iterdir()) == sorted(["files", lock.name])


def test_of_a_changed_kit_only_what_changed_is_sent(device: Device, tmp_path: Path) -> None:
    folder = tmp_path / "k"
    same, old = (write_wheel(folder, name, {f"{name}.py": ""}) for name in ("same", "old"))
    put(device, make_kit(folder, [same, old]), folder)
    new = write_wheel(folder, "new", {"new.py": ""})
    assert put(device, make_kit(folder, [same, new]), folder).sent_bytes == new.stat().st_size


def test_a_kit_that_does_not_run_there_is_not_installed(device: Device, tmp_path: Path) -> None:
    folder = tmp_path / "k"
    broken = write_wheel(folder, "numpy", {"numpy/__init__.py": "raise ImportError('libm.so.6: GLIBC_9.9 not found')"})
    lock = make_kit(folder, [broken])
    with pytest.raises(WrongSystem, match=r"GLIBC_9\.9 not found"):
        put(device, lock, folder)
    assert [path.name for path in (Path(device.workdir) / "kits").iterdir()] == ["files"]
    assert not (Path(device.workdir) / "lease").exists()


def test_what_a_killed_installation_left_is_cleared(device: Device, tmp_path: Path) -> None:
    folder = tmp_path / "k"
    lock = make_kit(folder, [write_wheel(folder, "thing", {"thing.py": ""})])
    left = Path(device.workdir, "kits", "0123456789abcdef.part", "site")
    left.mkdir(parents=True)
    half = Path(device.workdir, "kits", f"{lock.name}.part", "site")
    half.mkdir(parents=True)
    (half / "thing.py").write_text("half")
    done = put(device, lock, folder)
    assert not list(Path(device.workdir, "kits").glob("*.part"))
    assert Path(done.python).parent.parent.joinpath("site/thing.py").read_text() == ""


def test_a_kit_for_another_system_is_refused_before_anything_is_sent(device: Device, tmp_path: Path) -> None:
    folder = tmp_path / "k"
    lock = make_kit(folder, [write_wheel(folder, "thing", {"thing.py": ""})])
    assert isinstance(lock.system, Board)
    with pytest.raises(WrongSystem, match=r"Python 3\.99"):
        put(device, replace(lock, system=replace(lock.system, python=(3, 99))), folder)
    assert not Path(device.workdir, "kits").exists()


def test_a_kit_is_not_installed_beside_a_measurement(device: Device, tmp_path: Path) -> None:
    folder = tmp_path / "k"
    lock = make_kit(folder, [write_wheel(folder, "thing", {"thing.py": ""})])
    Path(device.workdir).mkdir()
    with LocalTransport() as transport:
        lease = Lease(device=device, folder=f"{device.workdir}/lease", owner=describe_owner())
        lease.take(transport)
        with pytest.raises(TargetBusy):
            put(device, lock, folder)
        lease.release(transport)


def test_a_disk_too_small_for_the_unpacked_kit_is_no_space(device: Device, tmp_path: Path) -> None:
    folder = tmp_path / "k"
    lock = make_kit(folder, [write_wheel(folder, "thing", {"thing.py": ""})])
    huge = tuple(replace(file, unpacked_bytes=1 << 60) for file in lock.files)
    with pytest.raises(NoSpace, match="the kit needs"):
        put(device, replace(lock, files=huge), folder)
    assert not list(Path(device.workdir).rglob("*.whl"))


def test_the_unpacking_program_fails_whole(tmp_path: Path) -> None:
    (tmp_path / "broken.whl").write_bytes(b"no archive")
    request = {"kit": str(tmp_path / "kits/k"), "lock": "", "wheels": [str(tmp_path / "broken.whl")], "programs": []}
    (tmp_path / "kits").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", install.__file__.replace("install.py", "unpack.py"), json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "BadZipFile" in done.stderr
    assert list((tmp_path / "kits").iterdir()) == []


def test_the_check_starts_what_the_kit_holds_and_nothing_else() -> None:
    system = Board(machine="aarch64", python=(3, 11), glibc=(2, 36))
    only_onnx = KitLock(system=system, runtimes={"onnx": ("onnxruntime", "1")}, files=())
    assert "onnxruntime" in install.write_check(only_onnx)
    assert "ai_edge_litert" not in install.write_check(only_onnx)
    assert "RUNNER" not in install.write_check(only_onnx)


def test_pip_without_a_wheel_says_which_python_is_wrong() -> None:
    board = Board(machine="aarch64", python=(3, 9), glibc=(2, 31))
    said = "ERROR: Could not find a version that satisfies x\nERROR: No matching distribution found for onnx"
    assert isinstance(wheels._explain(said, board), WrongSystem)
    unreachable = "WARNING: Retrying after Connection broken\n" + said
    assert isinstance(wheels._explain(unreachable, board), BuildError)


def test_a_missing_cross_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BuildError, match=r"lacks .*g\+\+") as caught:
        compiling._find_compiler("aarch64")
    assert "apt-get install" in caught.value.hint


def test_the_verb_refuses_unknown_formats_and_devices() -> None:
    with pytest.raises(InputError, match="'coreml'"):
        kit(["build", "this-machine", "--formats", "onnx,coreml"])
    with pytest.raises(InputError, match="unknown device"):
        kit(["install", "nowhere"])


def test_after_an_installation_the_inventory_names_the_kits_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = write_wheel(tmp_path / "k", "numpy", {"numpy.py": "", "psutil.py": ""})
    keep_kit(make_kit(tmp_path / "k", [wheel]), tmp_path / "k", "here")
    inventory = tmp_path / "devices.toml"
    inventory.write_text(
        f'# mine\n[here]\ntransport = "local"\nworkdir = "{tmp_path}/work"\n\n[other]\ntransport = "local"\n'
    )
    inventory.chmod(0o600)
    asked = ["install", "here", "--inventory", str(inventory)]
    assert kit(asked) == 0
    devices = load_inventory(inventory)
    assert Path(devices["here"].python).is_relative_to(tmp_path / "work/kits")
    assert devices["other"].python == "python3"
    assert inventory.read_text().startswith("# mine\n[here]\n")
    with LocalTransport() as transport:
        assert transport.run([devices["here"].python, "-c", "import numpy"], timeout_s=60).code == 0
    capsys.readouterr()
    before = inventory.read_bytes()
    assert kit(asked) == 0
    assert "python" not in capsys.readouterr().out, "it is named already"
    assert inventory.read_bytes() == before


def test_an_inventory_that_cannot_be_changed_by_rule_is_left_with_the_line_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = write_wheel(tmp_path / "k", "numpy", {"numpy.py": "", "psutil.py": ""})
    keep_kit(make_kit(tmp_path / "k", [wheel]), tmp_path / "k", "here")
    inventory = tmp_path / "devices.toml"
    inventory.write_text(f'here = {{transport = "local", workdir = "{tmp_path}/work"}}\n')
    inventory.chmod(0o600)
    assert kit(["install", "here", "--inventory", str(inventory)]) == 0
    said = capsys.readouterr().out
    assert "under [here], write" in said
    assert f'python = "{tmp_path}/work/kits/' in said


def test_a_phone_that_cannot_unpack_keeps_nothing_half(tmp_path: Path) -> None:
    folder = tmp_path / "k"
    folder.mkdir()
    (folder / "bundle.tar").write_bytes(b"tar")
    lock = KitLock(system=Phone(), runtimes={}, files=(describe_file(folder / "bundle.tar", 3),))

    def shell(phone: FakeTransport, argv: Sequence[str]) -> Completed:
        if "pwd" not in argv[2]:  # what copying asks
            return COMMANDS["sh"](phone, argv)
        phone.folders |= {"/data", "/data/w"}
        return Completed(code=0, stdout="/data/w\n", stderr="")

    phone = FakeTransport(
        {
            "sh": shell,
            "getprop": lambda _, __: Completed(code=0, stdout="arm64-v8a\n", stderr=""),
            "tar": lambda _, __: Completed(code=1, stdout="", stderr="tar: short read\n"),
        }
    )
    with pytest.raises(CommandFailed, match="short read"):
        install_kit(phone, Device(name="pixel6", transport="adb", serial="1", workdir="w"), lock, folder, quiet)
    assert not [name for name in phone.folders if name.endswith(".part")]
    assert not [name for name in phone.files if name.startswith("/data/w/lease")]
