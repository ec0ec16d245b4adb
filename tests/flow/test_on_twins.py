"""The main job on emulated devices: kit, parity by the runtime that is timed, samples home, report; all by verbs."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rankship_benchmarks.bundle.bundle import Bundle, open_bundle
from rankship_benchmarks.measure import one_device
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.artifact_key import VARIANTS, ArtifactKey
from rankship_pipeline.foundation.formats import FORMATS
from rankship_targets.devices.device import Device, find_device
from rankship_targets.kit import lock
from rankship_targets.session.session import open_session
from rankship_targets.twin import board, debian_root, pi, pixel

pytestmark = [pytest.mark.twin, pytest.mark.slow]
SUITE = "canary = false\nrounds = 1\nmin_samples = 3\nmin_duration_ms = 1\nmax_warmup_ms = 50\n"
MakeOrSkip = Callable[[Callable[[], Path]], Path]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep kits and what the devices store in a folder of these tests; what stand-ins are made of is the user's.

    Nothing is profiled, which no test here looks at: on a translated processor it takes as long as to measure.
    """
    folder = tmp_path_factory.mktemp("twins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "user_folder", lambda *_: folder / "cache")
        patch.setattr(one_device, "profile_run", lambda *_: None)
        for room in (pi, pixel):
            patch.setattr(room, "find_storage", lambda name: folder / "storage" / name)
        yield folder


@pytest.fixture(scope="module")
def recipe(shared_recipe: Path) -> Path:
    """The shared recipe, with files of 8 bits too."""
    own = shared_recipe.with_name("bits.toml")
    own.write_text(f'{shared_recipe.read_text()}\n[precision]\nweights = ["float32", "int8"]\n')
    return own


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of these tests' own: in the shared one others look for files of the shared recipe."""
    return tmp_path_factory.mktemp("bits")


def equip(twin: str, inventory: Path) -> Device:
    """Add a twin and give it a kit with every format's runtime, as a user does."""
    name = f"{twin}-at-work"
    flags = ["--inventory", str(inventory)]
    for words in (["devices", "add", name, "--twin", twin], ["kit", "build", name], ["kit", "install", name]):
        assert main([*words, *flags]) == 0
    return find_device(name, inventory)


def run(recipe: Path, store: Path, device: Device, folder: Path) -> Bundle:
    suite = folder / "suite.toml"
    suite.write_text(f'recipe = "{recipe}"\n{SUITE}')
    flags = ["--on", device.name, "--inventory", str(folder / "devices.toml"), "--store", str(store)]
    assert main(["run", str(recipe), "--suite", str(suite), *flags, "--results", str(folder / "results")]) == 0
    (bundle,) = (folder / "results").glob("[!.]*")
    assert (bundle / "report.html").stat().st_size > 10_000
    return open_bundle(bundle)


def check(bundle: Bundle, device: Device) -> None:
    """All formats, dense, compressed and in 8 bits: proven there by what timed them there, and every sample at home."""
    wanted = [ArtifactKey(variant=variant, format=name) for variant in VARIANTS for name in FORMATS]
    wanted += [ArtifactKey(variant="compressed", format=name, precision="int8") for name in FORMATS]
    assert bundle.finished
    assert [one.key for one in bundle.header.verified_on_device] == wanted
    assert Counter(one.key for one in bundle.trials) == Counter(wanted)
    proven = {one.key: (one.runtime, one.runtime_version) for one in bundle.header.verified_on_device}
    for trial in bundle.trials:
        assert (trial.runtime.name, trial.runtime.version) == proven[trial.key]
        assert (trial.runtime.machine, trial.device) == ("aarch64", device.name)
        assert len(trial.samples_ns) >= 3
    limits = {"float32": 1e-4, "int8": 0.05}
    errors = {one.key: one.max_relative_error for one in bundle.header.verified_on_device}
    assert all(0 <= error < limits[key.precision] for key, error in errors.items())


def test_the_main_job_on_an_emulated_pi(
    able_machine: None,
    make_or_skip: MakeOrSkip,
    places: Path,
    recipe: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del able_machine  # it skips
    make_or_skip(debian_root.find_root)
    device = equip("pi4", tmp_path / "devices.toml")
    assert device.python.startswith(f"/home/{debian_root.USER}/.cache/"), "the inventory names the kit's own Python"
    assert (places / "storage" / device.name).is_dir()
    bundle = run(recipe, store, device, tmp_path)
    check(bundle, device)
    assert bundle.header.conditions["processor"] == board.MODEL
    assert f"Parity on {device.name}, worst of 9 artifacts" in capsys.readouterr().out


def test_the_main_job_on_an_emulated_phone(
    start_phone: Callable[..., Any],
    places: Path,
    recipe: Path,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del start_phone  # it skips
    device = equip("pixel6", tmp_path / "devices.toml")
    assert device.python.endswith("/py.sh"), "the inventory names the kit's own Python"
    assert (places / "storage" / device.name).is_dir()
    check(run(recipe, store, device, tmp_path), device)
    printed = capsys.readouterr().out
    assert f"Parity on {device.name}, worst of 9 artifacts" in printed
    assert "The device is a stand-in, emulated, for a pixel6" in printed
    with open_session(device) as session:
        probe = session.probe()
    assert (probe.machine, probe.cpu_count) == ("aarch64", 8)
    assert (probe.state.temperature_mc, probe.state.governor) == (41_200, "sched_pixel")
