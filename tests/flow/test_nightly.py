"""Two nights on two devices at once, from a recipe to the page of all nights, through the verbs."""

import sys
from pathlib import Path

import pytest

from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_benchmarks.measure.profiles import read_profiles
from rankship_benchmarks.nightly.alerts import NightSummary
from rankship_benchmarks.nightly.lab import LAB_PAGE
from rankship_benchmarks.nightly.records import list_nights
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.codec import decode

SUITE = 'recipe = "{recipe}"\nrounds = 2\nmin_samples = 20\nmin_duration_ms = 5\nmax_warmup_ms = 50\ncanary = false\n'


@pytest.mark.slow
def test_two_nights_on_two_devices(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + '\n[export]\nformats = ["onnx"]\n')
    suite, inventory, results = recipe.with_name("small.toml"), tmp_path / "devices.toml", tmp_path / "nights here"
    suite.write_text(SUITE.format(recipe=recipe.name))
    inventory.write_text(f'[second]\ntransport = "local"\npython = "{sys.executable}"\nworkdir = "{tmp_path}/second"\n')
    flags = ["--on", "this-machine,second", "--inventory", str(inventory), "--store", str(tmp_path / "store")]
    for number in (1, 2):
        told = tmp_path / "night.json"
        status = main(["nightly", str(suite), *flags, "--results", str(results), "--json", str(told)])
        assert decode(NightSummary, told.read_bytes(), where=str(told)).exit_code == status
        assert status in {0, 5}  # 5 where other work on this host spoils the rounds, which is said
        night = list_nights(results)[-1]
        assert (night.number, night.exit_code, night.suite, night.recipe) == (number, status, "small", "tiny")
        for name, one in zip(("this-machine", "second"), night.devices, strict=True):
            bundle = open_bundle(results / str(one.run))
            assert (bundle.header.device, bundle.finished, len(bundle.trials)) == (name, True, 4)
            assert bundle.header.build_sha256 == night.build_sha256
            assert read_profiles(results / str(one.run)) is not None
            assert one.gap is None or "rounds count" in one.gap
    assert "Night 2" in (results / "nightly.html").read_text()
    assert main(["index", "--results", str(results)]) == 0
    assert main(["lab", "--results", str(results), "--inventory", str(inventory)]) == 0
    assert "second" in (results / LAB_PAGE).read_text()
    assert main(["export", str(results), "--to", str(tmp_path / "trials.csv")]) == 0
    assert len((tmp_path / "trials.csv").read_text().splitlines()) == 1 + 2 * 2 * 4
    assert main(["bench", str(suite), *flags, "--results", str(tmp_path / "results")]) == 0
    assert len(list((tmp_path / "results").glob("*/report.html"))) == 2
