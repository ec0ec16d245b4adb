"""Fixtures of the stand-ins for a Raspberry Pi 4, and small models made on the spot for them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from make.chains import Model, Weights, make_tflite, prove_bytes
from make.onnx_files import make_products
from make.waiting import is_alive, wait_until
from rankship_pipeline.foundation.artifact_key import Variant
from rankship_pipeline.foundation.formats import Format
from rankship_targets.devices.device import Device
from rankship_targets.session.manifest import sign_artifact
from rankship_targets.twin.debian_root import find_root
from rankship_targets.twin.machine import Machine, boot
from rankship_targets.twin.machine_files import PACKAGES, QEMU, TOOLS, find_machine_files
from rankship_targets.twin.pi import start_pi

WIDTH, RANK = 256, 16


@pytest.fixture(scope="session")
def able_pi(able_machine: None, make_or_skip: Callable[[Callable[[], Path]], Path]) -> None:  # noqa: ARG001 - it skips
    """Make what the stand-ins for a Raspberry Pi are made of, or skip."""
    make_or_skip(find_root)


@pytest.fixture(scope="session")
def pi4(able_pi: None) -> Device:  # noqa: ARG001 - it skips
    """Give the one everyday Pi that tests share; whoever must break a Pi starts another under its own name."""
    return start_pi(Device(name="pi4", transport="ssh"))


@pytest.fixture(scope="session")
def able_qemu(able_pi: None, make_or_skip: Callable[[Callable[[], Path]], Path]) -> None:  # noqa: ARG001 - it skips
    missing = [tool for tool in (QEMU, "fdtput", "mke2fs") if not shutil.which(tool, path=TOOLS)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install {PACKAGES}")
    make_or_skip(find_machine_files)


@pytest.fixture(scope="session")
def system_pi(able_qemu: None) -> Iterator[Machine]:  # noqa: ARG001 - it skips
    with boot() as machine:
        yield machine


@pytest.fixture(scope="session")
def icount_machine(able_qemu: None) -> Iterator[Machine]:  # noqa: ARG001 - it skips
    with boot(icount=True, name="counting-pi") as machine:
        yield machine


@pytest.fixture
def await_gone() -> Callable[[list[psutil.Process]], None]:
    """Wait until processes have ended, also those that nobody has reaped yet."""

    def wait(family: list[psutil.Process]) -> None:
        wait_until(lambda: not any(is_alive(one.pid) for one in family))

    return wait


@pytest.fixture(scope="session")
def chains() -> dict[Variant, list[Weights]]:
    """Give two square matrices, and the same with each as a pair of rank 16."""
    random = np.random.default_rng(0)

    def draw(rows: int, columns: int) -> Weights:
        return random.normal(size=(rows, columns)).astype(np.float32) / np.float32(np.sqrt(rows))

    pairs = [draw(*shape) for shape in ((WIDTH, RANK), (RANK, WIDTH)) * 2]
    return {"dense": [draw(WIDTH, WIDTH) for _ in range(2)], "compressed": pairs}


@pytest.fixture
def models(model_files: dict[tuple[Format, Variant], Model]) -> dict[tuple[Format, Variant], Model]:
    """Give every model, signed as proven by the key that this test's user has."""
    for model in model_files.values():
        sign_artifact(model.path, model.verified, recipe_sha256="none")
    return model_files


@pytest.fixture(scope="session")
def model_files(
    chains: dict[Variant, list[Weights]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Format, Variant], Model]:
    folder = tmp_path_factory.mktemp("models")
    made: dict[tuple[Format, Variant], Model] = {}
    for variant, weights in chains.items():
        for name, data in (("onnx", make_products(*weights).SerializeToString()), ("tflite", make_tflite(weights))):
            kind: Format = "onnx" if name == "onnx" else "tflite"
            path = folder / f"{variant}.{kind}"
            path.write_bytes(data)
            made[kind, variant] = Model(path, weights, prove_bytes(data, kind, variant))
    return made


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "x.npy"
    np.save(path, np.random.default_rng(1).normal(size=(3, WIDTH)).astype(np.float32))
    return path
