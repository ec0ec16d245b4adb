"""A rack of two hosts, whose users have signing keys of their own: a bench and a night there, through the verbs."""

import sys
from pathlib import Path

import pytest

from make.racks import running
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_benchmarks.nightly.records import list_nights
from rankship_pipeline.cli import main

SUITE = 'recipe = "{recipe}"\nrounds = 2\nmin_samples = 20\nmin_duration_ms = 5\nmax_warmup_ms = 50\n'
BOARD = '[{name}]\ntransport = "local"\npython = "{python}"\nworkdir = "{folder}/{name}"\n'


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # Dask's
def test_a_bench_and_a_night_on_the_boards_of_two_hosts(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(recipe.read_text() + '\n[export]\nformats = ["onnx"]\n')
    suite = recipe.with_name("small.toml")
    suite.write_text(SUITE.format(recipe=recipe.name))
    boards = tmp_path / "boards"
    boards.mkdir()
    with running(boards) as rack:
        assert rack.keys is not None
        rack.start_scheduler()
        for name in ("one", "two"):
            inventory = boards / f"{name}.toml"
            inventory.write_text(BOARD.format(name=name, python=sys.executable, folder=boards))
            rack.start_worker(f"host of {name}", inventory, [name])
        where = ["--scheduler", rack.way.address, "--keys", str(rack.keys), "--store", str(tmp_path / "store")]
        night = ["nightly", str(suite), "--on", "one/two", *where, "--results", str(tmp_path / "nights")]
        assert main(night) in {0, 5}  # 5 where other work on this host spoils the rounds
        assert main(["bench", str(suite), "--on", "one,two", *where, "--results", str(tmp_path / "results")]) == 0
        capsys.readouterr()
        assert main(["bench", str(suite), "--on", "three", *where, "--results", str(tmp_path / "results")]) == 4
    assert "no host of the rack offers three" in capsys.readouterr().err
    (done,) = list_nights(tmp_path / "nights")
    (one,) = done.devices
    assert (one.measured_on, one.losses) == ("one", ())
    runs = [tmp_path / "nights" / str(one.run), *(tmp_path / "results").glob("[!.]*")]
    headers = [open_bundle(run).header for run in runs]
    assert sorted(header.device for header in headers) == ["one", "one", "two"]
    for run, header in zip(runs, headers, strict=True):
        bundle = open_bundle(run)
        assert bundle.finished
        assert len(bundle.trials) == 2 * 3  # dense, compressed and the canary
        assert [proof.artifact_sha256 for proof in header.verified_on_device] == [
            proof.artifact_sha256 for proof in header.verified
        ]
        assert (run / "profiles.json").exists()
    assert len(list((tmp_path / "results").glob("*/report.html"))) == 2
