"""The index over many runs: derived from their bundles through SQLAlchemy, and rebuilt from them at any time.

SQLite beside the bundles by default, any other database by URL. Bundles are the source: a bundle whose bytes changed is
read again, one that is gone leaves the index, one that cannot be read is listed with the reason.
"""

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, delete, event, insert, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool

from rankship_benchmarks.bundle.bundle import BUNDLE_FILE, Bundle, find_cases, open_bundle
from rankship_benchmarks.index.tables import BY_RUN, CASES, METADATA, REASONS, RUNS, TRIALS, VERSION, VERSIONS
from rankship_benchmarks.judge.energy_figures import CaseEnergy, judge_energy
from rankship_benchmarks.judge.summary import find_accuracy, group_trials
from rankship_benchmarks.judge.validity import judge_trial, keep_trusted, name_distrust
from rankship_benchmarks.stats.estimates import estimate_median, median_by_round
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Artifact
from rankship_targets.trials.trial import Trial

INDEX_FILE = "index.sqlite"
_LOCK_WAIT_S = 120
_LOCK_KEY = int.from_bytes(hashlib.sha256(b"rankship index").digest()[:7], "big")


@record
class Refresh:
    """What a refresh changed, by folders' names; `damaged` maps a bundle that cannot be read to the reason."""

    added: tuple[str, ...]
    unchanged: int
    removed: tuple[str, ...]
    damaged: dict[str, str]


def default_url(results: Path) -> str:
    """Return the URL of the SQLite file beside the bundles."""
    return f"sqlite:///{results.resolve() / INDEX_FILE}"


def open_index(url: str) -> Engine:
    """Return an engine whose every transaction locks the whole index; InputError for an invalid URL."""
    try:
        parsed = make_url(url)
        wait = {"timeout": _LOCK_WAIT_S} if _is_sqlite(parsed.drivername) else {}
        engine = create_engine(parsed, connect_args=wait, poolclass=NullPool)  # nothing stays open between transactions
    except (ArgumentError, NoSuchModuleError) as failure:
        hint = "for example sqlite:////srv/index.sqlite or postgresql+psycopg://user@host/name"
        raise InputError(f"no database at this URL: {str(failure).splitlines()[0]}", hint=hint) from None
    except ModuleNotFoundError as failure:
        message = f"{parsed.render_as_string(hide_password=True)} needs the Python package {failure.name}"
        raise InputError(message, hint="for Postgres: pip install 'rankship[postgres]'") from None
    if _is_sqlite(parsed.drivername):
        event.listen(engine, "connect", _leave_transactions_to_us)
        event.listen(engine, "begin", _begin_at_once)
    return engine


def refresh_index(engine: Engine, results: Path, *, alone: bool = False) -> Refresh:
    """Update the index from the bundles of one results folder, in one transaction; writers take turns.

    An index of this folder `alone` forgets what it holds of others: the same folder, before it was moved.
    """
    source = f"{socket.gethostname()}:{results.resolve()}"
    found = {path.parent.name: hash_file(path) for path in sorted(results.glob(f"[!.]*/{BUNDLE_FILE}"))}
    with _writing(engine) as connection:
        if alone:
            for number in connection.scalars(select(RUNS.c.id).where(RUNS.c.source != source)).all():
                _drop_run(connection, number)
        rows = connection.execute(select(RUNS.c.folder, RUNS.c.file_sha256, RUNS.c.id).where(RUNS.c.source == source))
        known = {folder: (sha256, number) for folder, sha256, number in rows}
        stale = [folder for folder, (sha256, _) in known.items() if found.get(folder) != sha256]
        for folder in stale:
            _drop_run(connection, known[folder][1])
        added = [folder for folder in found if folder not in known or folder in stale]
        for folder in added:
            _add_run(connection, source, results / folder)
        damaged = connection.execute(
            select(RUNS.c.folder, RUNS.c.damage).where(RUNS.c.source == source, RUNS.c.damage.is_not(None))
        )
        return Refresh(
            added=tuple(added),
            unchanged=len(found) - len(added),
            removed=tuple(folder for folder in stale if folder not in found),
            damaged={folder: str(reason) for folder, reason in damaged},
        )


def refresh_own_index(results: Path) -> Engine:
    """Refresh the index beside the bundles; a file that is not a database any more is deleted and rebuilt."""
    path = results / INDEX_FILE
    engine = open_index(default_url(results))
    try:
        refresh_index(engine, results, alone=True)
    except OperationalError:
        raise
    except DatabaseError:
        engine.dispose()
        path.unlink(missing_ok=True)
        engine = open_index(default_url(results))
        refresh_index(engine, results, alone=True)
    return engine


@contextmanager
def _writing(engine: Engine) -> Iterator[Connection]:
    """Begin an exclusive transaction, with tables of this version."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        if not inspect(connection).has_table(VERSIONS.name) or _read_version(connection) != VERSION:
            METADATA.drop_all(connection)
            METADATA.create_all(connection)
            connection.execute(insert(VERSIONS), {"version": VERSION})
        yield connection


def _read_version(connection: Connection) -> int | None:
    return connection.execute(select(VERSIONS.c.version)).scalar()


def _is_sqlite(driver: str) -> bool:
    return driver.partition("+")[0] == "sqlite"


def _leave_transactions_to_us(connection: Any, _: object) -> None:  # noqa: ANN401 - the driver's own class
    connection.isolation_level = None


def _begin_at_once(connection: Connection) -> None:
    """Take the write lock at the start, so that two writers wait for each other instead of failing half-way."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _drop_run(connection: Connection, number: int) -> None:
    for table in BY_RUN:
        connection.execute(delete(table).where(table.c.run == number))
    connection.execute(delete(RUNS).where(RUNS.c.id == number))


def _add_run(connection: Connection, source: str, folder: Path) -> None:
    row: dict[str, object] = {"source": source, "folder": folder.name, "file_sha256": hash_file(folder / BUNDLE_FILE)}
    try:
        bundle = open_bundle(folder)
    except InputError as failure:
        connection.execute(insert(RUNS), row | {"damage": str(failure).replace(f"{folder}/", "")})
        return
    header = bundle.header
    names = ("run_id", "created_utc", "device", "recipe", "recipe_sha256", "build_sha256", "suite_sha256", "rounds")
    row |= {name: getattr(header, name) for name in (*names, "rankship_version", "conditions")}
    (number,) = connection.execute(insert(RUNS).returning(RUNS.c.id), row | {"finished": bundle.finished}).one()
    trusted = {id(trial) for trial in keep_trusted(bundle.trials)}
    trials = [_describe_trial(trial) | {"trusted": id(trial) in trusted} for trial in bundle.trials]
    children = ((CASES, _list_cases(bundle)), (TRIALS, trials))
    reasons = [
        _name_trial(trial) | {"reason": reason}
        for trial in bundle.trials
        for reason in name_distrust([trial], bundle.trials)
    ]
    for table, entries in (*children, (REASONS, reasons)):
        listed = [{"run": number} | entry for entry in entries]
        if listed:
            connection.execute(insert(table), listed)


def _list_cases(bundle: Bundle) -> Iterator[dict[str, object]]:
    artifacts = find_cases(bundle)
    energies = judge_energy(bundle)
    for key, trials in group_trials(bundle.trials).items():
        if key in artifacts:
            yield _describe_case(bundle, artifacts[key], trials) | _describe_energy(energies.get(key))


def _describe_energy(energy: CaseEnergy | None) -> dict[str, object]:
    """Return the energy columns, null without a meter, so that all rows can be inserted together."""
    total, marginal = (energy.total, energy.marginal) if energy else (None, None)
    return {
        "meter": energy.meter if energy else None,
        "provenance": energy.provenance if energy else None,
        "energy_rounds": total.rounds if total else None,
        "energy_nj": total.value_nj if total else None,
        "energy_uncertainty_nj": total.uncertainty_nj if total else None,
        "marginal_nj": marginal.value_nj if marginal else None,
        "marginal_uncertainty_nj": marginal.uncertainty_nj if marginal else None,
    }


def _describe_case(bundle: Bundle, artifact: Artifact, trials: list[Trial]) -> dict[str, object]:
    valid = [trial for trial in trials if trial.samples_ns and not judge_trial(trial)]
    latency = estimate_median(list(median_by_round(valid).values())) if valid else None
    accuracy = find_accuracy(bundle.header.build, artifact.key.variant, artifact.key.precision)
    return asdict(artifact.key) | {
        "artifact_sha256": artifact.sha256,
        "size_bytes": artifact.size_bytes,
        "parameters": artifact.parameters,
        "accuracy_correct": accuracy.correct if accuracy else None,
        "accuracy_samples": accuracy.samples if accuracy else None,
        "score": accuracy.value if accuracy else None,
        "score_low": accuracy.low if accuracy else None,
        "score_high": accuracy.high if accuracy else None,
        "score_measure": accuracy.measure.name if accuracy else None,
        "score_unit": accuracy.measure.unit if accuracy else None,
        "runtime": trials[0].runtime.name,
        "runtime_version": trials[0].runtime.version,
        "threads": trials[0].threads,
        "valid_rounds": len(valid),
        "latency_ns": latency.value if latency else None,
        "latency_low_ns": latency.low if latency else None,
        "latency_high_ns": latency.high if latency else None,
    }


def _name_trial(trial: Trial) -> dict[str, object]:
    return {"round": trial.round} | asdict(trial.key)


def _describe_trial(trial: Trial) -> dict[str, object]:
    return _name_trial(trial) | {
        "started_utc": trial.started_utc,
        "samples": len(trial.samples_ns),
        "median_ns": median(trial.samples_ns) if trial.samples_ns else None,
        "load_ns": trial.load_ns,
        "cold_ns": trial.warmup_ns[0] if trial.warmup_ns else None,
        "warmed_up": trial.warmed_up,
        "peak_rss_bytes": trial.peak_rss_bytes,
        "runtime_rss_bytes": trial.runtime_rss_bytes,
        "retries": trial.retries,
        "valid": not judge_trial(trial),
    }
