"""The index and the exports say what the bundles say, whatever was deleted, killed or written twice meanwhile."""

import csv
import dataclasses
import getpass
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine, func, select

from make.artifacts import DENSE
from make.bundles import change_header, change_trial
from make.bundles import keep as keep_run
from make.judged_runs import make_run
from rankship_benchmarks.bundle.bundle import BUNDLE_FILE, Bundle, append_trial, writing
from rankship_benchmarks.index.frames import list_bundles, write_frame
from rankship_benchmarks.index.index import default_url, open_index, refresh_index, refresh_own_index
from rankship_benchmarks.index.tables import CASES, REASONS, RUNS, TRIALS
from rankship_benchmarks.stats.estimates import median_by_round
from rankship_pipeline.cli import main
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import write_atomic

MADE = make_run(rounds=2, layers=3, samples=5)
STEADY = tuple(  # five random samples would drift, and be doubted
    dataclasses.replace(one, samples_ns=tuple(one.samples_ns[0] + place % 2 for place in range(5)))
    for one in MADE.trials
)
SMALL = dataclasses.replace(MADE, trials=STEADY)


def keep(results: Path, name: str, bundle: Bundle = SMALL) -> Path:
    return keep_run(results / name, change_header(bundle, run_id=name))


def count(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in (RUNS, CASES, TRIALS, REASONS)
        }


def check_life(engine: Engine, results: Path) -> None:
    """One index's whole life: filled, unchanged, grown, shrunk, damaged, and never twice the same run."""
    keep(results, "one")
    keep(results, "two", dataclasses.replace(SMALL, trials=SMALL.trials[:5], finished=False))
    assert refresh_index(engine, results).added == ("one", "two")
    assert count(engine) == {"runs": 2, "cases": 11, "trials": 17, "reasons": 0}
    again = refresh_index(engine, results)
    assert (again.added, again.unchanged, again.removed) == ((), 2, ())
    with writing(results / "two"):
        append_trial(results / "two", SMALL.trials[5])
    assert refresh_index(engine, results).added == ("two",)
    assert count(engine) == {"runs": 2, "cases": 12, "trials": 18, "reasons": 0}
    shutil.rmtree(results / "one")
    assert refresh_index(engine, results).removed == ("one",)
    (results / "two" / BUNDLE_FILE).write_text('{"kind":"header"}\n{"kind":"trial"}\n')
    (reason,) = refresh_index(engine, results).damaged.values()
    assert str(results) not in reason
    assert count(engine) == {"runs": 1, "cases": 0, "trials": 0, "reasons": 0}


def check_two_writers(open_engine: Callable[[], Engine], results: Path) -> None:
    for number in range(6):
        keep(results, f"run{number}")
    failures: list[BaseException] = []

    def write() -> None:
        try:
            refresh_index(open_engine(), results)
        except BaseException as failure:  # noqa: BLE001 - told to the test
            failures.append(failure)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    assert count(open_engine()) == {"runs": 6, "cases": 36, "trials": 72, "reasons": 0}


def test_sqlite_follows_the_bundles(tmp_path: Path) -> None:
    check_life(open_index(default_url(tmp_path)), tmp_path)


def test_two_writers_of_sqlite_take_turns(tmp_path: Path) -> None:
    check_two_writers(lambda: open_index(default_url(tmp_path)), tmp_path)


def test_the_index_holds_what_the_bundle_says(tmp_path: Path) -> None:
    hot = dataclasses.replace(SMALL.trials[0].after, throttled_bits=0b100)
    keep(tmp_path, "one", change_trial(SMALL, 0, after=hot))
    engine = refresh_own_index(tmp_path)
    with engine.connect() as connection:
        trials = connection.execute(select(TRIALS).order_by(TRIALS.c.round, TRIALS.c.format, TRIALS.c.variant)).all()
        (refused,) = connection.execute(select(REASONS)).all()
        case = connection.execute(select(CASES).where(CASES.c.variant == "dense", CASES.c.format == "onnx")).one()
    names = [field.name for field in dataclasses.fields(ArtifactKey)]
    assert {(row.round, *(getattr(row, name) for name in names)): row.median_ns for row in trials} == {
        (one.round, *dataclasses.astuple(one.key)): median(one.samples_ns) for one in SMALL.trials
    }
    assert (refused.round, refused.variant, refused.format, refused.reason) == (0, "dense", "onnx", "throttled")
    assert [one.valid for one in trials].count(False) == 1
    dense = [one for one in SMALL.trials if (one.key, one.round) == (DENSE, 1)]
    assert case.latency_ns == median_by_round(dense)[1]
    assert (case.valid_rounds, case.latency_low_ns) == (1, None)


@pytest.mark.parametrize("harm", ["delete", "no database", "older version"])
def test_an_index_that_is_gone_or_spoilt_is_built_anew(tmp_path: Path, harm: str) -> None:
    keep(tmp_path, "one")
    before = count(refresh_own_index(tmp_path))
    index = tmp_path / "index.sqlite"
    if harm == "delete":
        index.unlink()
    elif harm == "no database":
        index.write_bytes(b"this was a database" * 100)
    else:
        with open_index(default_url(tmp_path)).begin() as connection:
            connection.exec_driver_sql("UPDATE rankship_index SET version = 0")
            connection.exec_driver_sql("ALTER TABLE trials DROP COLUMN retries")
    assert count(refresh_own_index(tmp_path)) == before


def test_several_results_folders_share_one_index(tmp_path: Path) -> None:
    engine = open_index(f"sqlite:///{tmp_path}/all.sqlite")
    for name in ("here", "there"):
        keep(tmp_path / name, "one")
        refresh_index(engine, tmp_path / name)
    assert count(engine)["runs"] == 2
    shutil.rmtree(tmp_path / "here/one")
    refresh_index(engine, tmp_path / "here")
    assert count(engine)["runs"] == 1


@pytest.mark.parametrize("url", ["nonsense", "mysterydb://x", "postgresql+nodriver://u:secret@h/d"])
def test_a_url_of_no_database_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InputError) as refused:
        open_index(url)
    assert "secret" not in str(refused.value)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Start a cluster of its own on a socket in a temporary folder; gives its URL."""
    found = [shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    programs = next((Path(one).resolve().parent for one in found if one), None)
    if programs is None:
        pytest.skip("no Postgres server here: apt-get install postgresql")
    root = os.geteuid() == 0
    if root and subprocess.run(["id", "postgres"], capture_output=True, check=False).returncode:
        pytest.skip("Postgres refuses to run as root, and there is no user postgres")
    user = "postgres" if root else getpass.getuser()
    as_user = ["setpriv", "--reuid", user, "--regid", user, "--init-groups"] if root else []
    with tempfile.TemporaryDirectory(prefix="rankship-postgres-") as name:  # the server's user must reach it
        folder = Path(name)
        if root:
            shutil.chown(folder, "postgres")
        data, log = folder / "data", folder / "log"
        make: list[str | Path] = [*as_user, programs / "initdb", "-D", data, "-A", "peer", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder)
        settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        control: list[str | Path] = [*as_user, programs / "pg_ctl", "-D", data, "-w"]
        if root:
            (data / "pg_ident.conf").write_text("here root postgres\nhere postgres postgres\n")
            (data / "pg_hba.conf").write_text("local all all peer map=here\n")
        subprocess.run([*control, "-l", log, "-o", settings, "start"], check=True, capture_output=True, cwd=folder)
        try:
            yield f"postgresql+psycopg://{user}@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd=folder)


@pytest.mark.system
def test_postgres_follows_the_bundles_and_its_writers_take_turns(tmp_path: Path, postgres: str) -> None:
    engine = open_index(postgres)
    check_life(engine, tmp_path / "life")
    shutil.rmtree(tmp_path / "life/two")
    refresh_index(engine, tmp_path / "life")
    check_two_writers(lambda: open_index(postgres), tmp_path / "writers")


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_an_export_holds_every_sample_once_and_no_zero_for_what_was_not_measured(tmp_path: Path, suffix: str) -> None:
    keep(tmp_path / "results", "one", change_trial(SMALL, 0, peak_rss_bytes=None))
    keep(tmp_path / "results", "two")
    folders = list_bundles(tmp_path / "results")
    samples, trials = tmp_path / f"samples{suffix}", tmp_path / f"out/trials{suffix}"
    assert write_frame(folders, "samples", samples) == 2 * 12 * 5
    assert write_frame(folders, "trials", trials) == 2 * 12
    rows = read_rows(samples)
    taken = [int(row["sample_ns"]) for row in rows if row["run_id"] == "two"]
    assert taken == [sample for trial in SMALL.trials for sample in trial.samples_ns]
    first, *_ = read_rows(trials)
    assert first["peak_rss_bytes"] in {None, ""}
    assert float(first["median_ns"]) == median(SMALL.trials[0].samples_ns)
    assert not list(tmp_path.rglob("*.tmp"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_verbs_say_what_they_did_and_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path, "one")
    assert main(["index", "--results", str(tmp_path)]) == 0
    assert "1 read, 0 unchanged" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "one"), "--to", str(tmp_path / "rows.csv")]) == 0
    write_atomic(tmp_path / "torn" / BUNDLE_FILE, b"{}\n")
    assert main(["index", "--results", str(tmp_path)]) == 5
    assert "torn cannot be read" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "nothing"), "--to", str(tmp_path / "rows.csv")]) == 2
    assert main(["export", str(tmp_path), "--to", str(tmp_path / "rows.xlsx")]) == 2
    assert main(["index", "--results", str(tmp_path / "nothing")]) == 2


# Run by the Python of MLflow's own environment: what its store holds.
ASK_MLFLOW = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
experiment = client.get_experiment_by_name(sys.argv[2])
runs = client.search_runs([experiment.experiment_id])
print(json.dumps([{"metrics": run.data.metrics, "params": run.data.params} for run in runs]))
"""


@pytest.mark.system
@pytest.mark.slow
def test_mlflow_gets_each_run_once(tmp_path: Path) -> None:
    programs = Path(__file__).parents[4] / ".venv-mlflow/bin"
    if not (programs / "rankship").exists():
        pytest.skip("MLflow needs an environment of its own: make .venv-mlflow/.installed")
    keep(tmp_path / "results", "one")
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def run(*argv: str | Path) -> str:
        return subprocess.run(argv, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    for logged in (1, 0):
        said = run(programs / "rankship", "export", tmp_path / "results", "--mlflow", uri)
        assert f"{logged} of 1 runs logged" in said
    (found,) = json.loads(run(programs / "python", "-W", "ignore", "-c", ASK_MLFLOW, uri, SMALL.header.recipe))
    assert found["metrics"]["onnx.dense.latency_ns"] > 0
    assert found["params"]["device"] == "pi4-bench"
