"""Kits for other processors, really built and run as aarch64 code: needs a Debian host, its mirror and a package index.

The processor is qemu's, and no phone or board is behind it: this shows that the code runs, not how fast.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from make.chains import make_tflite
from make.onnx_files import make_products
from rankship_targets.client.agent_file import find_agent
from rankship_targets.kit import lock as keeping
from rankship_targets.kit.build import build_kit
from rankship_targets.kit.lock import KitLock
from rankship_targets.kit.system import Board, Phone

PROGRAMS = ("qemu-aarch64-static", "aarch64-linux-gnu-g++", "apt-get", "dpkg-deb", "readelf")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.twin,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}"),
]
PROCESSOR = "cortex-a72"
# onnxruntime and XNNPACK read it, and die of what an x86 machine's says.
CPUINFO = "".join(
    f"processor\t: {number}\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n"
    for number in range(4)
)
EXPORT = """
import sys, pathlib, torch
from rankship_pipeline.export import executorch, keep_stdout_clean
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
executorch.export_graph(torch.export.export(model, (torch.zeros(1, 6),)), pathlib.Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the kits of this module in a folder of their own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "user_folder", lambda *_: folder)
        yield folder


@pytest.fixture(scope="module")
def phone_kit(kits: Path) -> tuple[KitLock, Path]:
    assert kits.is_dir()
    return build_kit(Phone(), "pixel6", ["onnx", "tflite", "executorch"], lambda _: None)


@pytest.fixture(scope="module")
def bundle(phone_kit: tuple[KitLock, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    archive = phone_kit[1] / "bundle.tar"
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)  # Python 3.11.2's tarfile knows no filter yet
    (folder / "overlay/proc").mkdir(parents=True)
    (folder / "overlay/proc/cpuinfo").write_text(CPUINFO)
    # What the bundle starts by itself has no qemu before it; a script of the host's brings it back.
    emulate = f"exec qemu-aarch64-static -cpu {PROCESSOR} -L {folder}/overlay"
    for name in ("py.sh", "executorch.sh"):
        text = (folder / name).read_text().replace("#!/system/bin/sh", "#!/bin/sh")
        (folder / name).write_text(text.replace("exec ", emulate + " "))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    subprocess.run([sys.executable, "-c", EXPORT, folder / "executorch"], check=True, capture_output=True, timeout=400)
    weights = [random.normal(size=shape).astype(np.float32) for shape in ((6, 8), (8, 3))]
    (folder / "onnx").write_bytes(make_products(*weights).SerializeToString())
    (folder / "tflite").write_bytes(make_tflite(weights))
    np.save(folder / "x.npy", random.normal(size=(3, 6)).astype(np.float32))
    return folder


def ask(argv: list[str], command: str, kind: str, models: Path, **more: object) -> list[dict[str, Any]]:
    request = {"command": command, "format": kind, "artifact": str(models / kind), "threads": 1, **more}
    text = json.dumps({**request, "inputs": [str(models / "x.npy")]})
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(
        [*argv, str(find_agent()), text], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", ["onnx", "tflite", "executorch"])
def test_the_phones_bundle_runs_every_format_as_this_machine_does(
    bundle: Path, models: Path, tmp_path: Path, kind: str
) -> None:
    events = ask([f"{bundle}/py.sh"], "infer", kind, models, output=str(tmp_path / "there"))
    assert events[1]["runtime"]["machine"] == "aarch64"
    ask([sys.executable], "infer", kind, models, output=str(tmp_path / "here"))
    there, here = (np.load(tmp_path / f"{name}.0.npy") for name in ("there", "here"))
    np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)


def test_the_phones_bundle_measures_without_torch(bundle: Path, models: Path) -> None:
    limits = {"min_samples": 5, "min_duration_ms": 1, "max_warmup_ms": 0}
    events = ask([f"{bundle}/py.sh"], "measure", "executorch", models, **limits)
    assert len(next(event["ns"] for event in events if event["event"] == "samples")) >= 5
    assert not list(bundle.rglob("torch"))


def test_the_bundle_starts_itself_again_by_its_own_name(bundle: Path) -> None:
    code = (
        "import sys, subprocess; print(sys.executable); subprocess.run([sys.executable, '-c', 'print(7)'], check=True)"
    )
    done = subprocess.run([f"{bundle}/py.sh", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["7", f"{bundle}/py.sh"] or done.stdout.split() == [f"{bundle}/py.sh", "7"]


def test_the_same_phone_kit_comes_out_again(phone_kit: tuple[KitLock, Path]) -> None:
    again, _ = build_kit(Phone(), "pixel6", ["onnx", "tflite", "executorch"], lambda _: None)
    assert again.name == phone_kit[0].name


@pytest.mark.usefixtures("kits")
def test_a_pis_kit_holds_wheels_for_its_python_alone() -> None:
    """A kit of every format, for the emulated Pi's own Python, is built and used by the main job on it."""
    board = Board(machine="aarch64", python=(3, 13), glibc=(2, 36))
    lock, _ = build_kit(board, "pi4", ["onnx", "tflite"], lambda _: None)
    names = [file.name for file in lock.files]
    assert sum("cp313-cp313" in name for name in names) >= 3
    assert not [name for name in names if "x86_64" in name]
    assert set(lock.runtimes) == {"onnx", "tflite"}
