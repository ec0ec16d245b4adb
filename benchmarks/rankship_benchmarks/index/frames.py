"""Runs as flat rows for a notebook: per trial, per inference or per metered trial; Parquet or CSV, bundle by bundle.

None stays null in Parquet and an empty field in CSV: what was not measured is never 0.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rankship_benchmarks.bundle.bundle import BUNDLE_FILE, Bundle, open_bundle
from rankship_benchmarks.judge.energy_figures import read_rounds
from rankship_benchmarks.judge.validity import judge_trial, keep_trusted, name_distrust
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.errors import InputError
from rankship_targets.trials.trial import Trial

Rows = Literal["trials", "samples", "energy"]
Row = dict[str, object]
Write = Callable[[Iterable[Row]], None]

# Column → the name of its Arrow type. All tables begin with these columns.
_NAMES = {
    "run_id": "string",
    "created_utc": "string",
    "device": "string",
    "recipe": "string",
    **dict.fromkeys((one.name for one in fields(ArtifactKey)), "string"),
    "round": "int32",
}
COLUMNS: dict[Rows, dict[str, str]] = {
    "trials": {
        **_NAMES,
        "started_utc": "string",
        "valid": "bool",
        "trusted": "bool",
        "reasons": "string",
        "samples": "int32",
        "median_ns": "float64",
        "load_ns": "int64",
        "cold_ns": "int64",
        "warmed_up": "bool",
        "threads": "int32",
        "peak_rss_bytes": "int64",
        "runtime_rss_bytes": "int64",
        "retries": "int32",
        "runtime": "string",
        "runtime_version": "string",
        "governor": "string",
        "temperature_before_mc": "int32",
        "temperature_after_mc": "int32",
        "artifact_sha256": "string",
        "build_sha256": "string",
    },
    "samples": {**_NAMES, "valid": "bool", "trusted": "bool", "inference": "int32", "sample_ns": "int64"},
    "energy": {
        **_NAMES,
        "started_utc": "string",
        "valid": "bool",
        "trusted": "bool",
        "reasons": "string",
        "meter": "string",
        "provenance": "string",
        "rails": "string",
        "inferences": "int64",
        "loop_ns": "int64",
        "total_nj": "float64",
        "total_bound_nj": "float64",
        "marginal_nj": "float64",
        "marginal_bound_nj": "float64",
        "idle_uw": "int64",
        "idle_drift_uw": "int64",
        "calibration_ppm": "int64",
        "trace_sha256": "string",
        "artifact_sha256": "string",
        "build_sha256": "string",
    },
}
_BATCH = 50_000


def list_bundles(path: Path) -> list[Path]:
    """Find every run's folder in a results folder, or `path` itself if it is one; InputError if there is none."""
    found = (
        [path] if (path / BUNDLE_FILE).is_file() else sorted(one.parent for one in path.glob(f"[!.]*/{BUNDLE_FILE}"))
    )
    if not found:
        raise InputError(
            f"{path} holds no run", hint="give a results folder, or one run's folder: it holds trials.jsonl"
        )
    return found


def list_rows(bundle: Bundle, rows: Rows) -> Iterator[Row]:
    """Yield a bundle's rows in the order in which they were measured."""
    if rows == "energy":
        yield from _list_energies(bundle)
        return
    trusted = {id(trial) for trial in keep_trusted(bundle.trials)}
    for trial in bundle.trials:
        head = _name(bundle, trial) | {"valid": not judge_trial(trial), "trusted": id(trial) in trusted}
        if rows == "trials":
            yield head | _describe(bundle, trial)
        else:
            for place, sample in enumerate(trial.samples_ns):
                yield head | {"inference": place, "sample_ns": sample}


def _name(bundle: Bundle, trial: Trial) -> Row:
    head: Row = {name: getattr(bundle.header, name) for name in ("run_id", "created_utc", "device", "recipe")}
    return head | asdict(trial.key) | {"round": trial.round}


def _list_energies(bundle: Bundle) -> Iterator[Row]:
    """Yield one row per metered trial; the marginal figure is null if it is not supported."""
    plan = bundle.header.energy
    cases = read_rounds(bundle.metered, plan) if plan else {}
    trusted = {id(trial) for trial in keep_trusted([one.trial for one in bundle.metered])}
    for one in bundle.metered:
        trial, case = one.trial, cases[one.trial.key]
        found = case.rounds.get(trial.round)
        supported = found if found and not found.overlap else None
        yield _name(bundle, trial) | {
            "started_utc": trial.started_utc,
            "valid": found is not None,
            "trusted": found is not None and id(trial) in trusted,
            "reasons": case.refused.get(trial.round) or (found.overlap if found else "") or None,
            "meter": one.trace.meter,
            "provenance": one.trace.provenance,
            "rails": "; ".join((plan.rails if plan else ()) or [rail.name for rail in one.trace.rails]),
            "inferences": len(trial.samples_ns),
            "loop_ns": trial.loop.length_ns if trial.loop else None,
            "total_nj": found.total.value_nj if found else None,
            "total_bound_nj": found.total.bound_nj if found else None,
            "marginal_nj": supported.marginal.value_nj if supported else None,
            "marginal_bound_nj": supported.marginal.bound_nj if supported else None,
            "idle_uw": found.idle_uw if found else None,
            "idle_drift_uw": found.idle_drift_uw if found else None,
            "calibration_ppm": plan.calibration_ppm if plan else None,
            "trace_sha256": one.trace_sha256,
            "artifact_sha256": trial.artifact_sha256,
            "build_sha256": bundle.header.build_sha256,
        }


def write_frame(folders: Sequence[Path], rows: Rows, to: Path) -> int:
    """Write every run's rows to one file, whole or not at all; returns their count. The suffix chooses the format."""
    if to.suffix not in _WRITERS:
        known = ", ".join(_WRITERS)
        raise InputError(
            f"{to}: cannot write {to.suffix or 'a file without suffix'}", hint=f"end the name with {known}"
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.tmp")
    count = 0
    try:
        with _WRITERS[to.suffix](temporary, COLUMNS[rows]) as write:
            for folder in folders:
                batch: list[Row] = []
                for row in list_rows(open_bundle(folder), rows):
                    batch.append(row)
                    count += 1
                    if len(batch) == _BATCH:
                        write(batch)
                        batch = []
                write(batch)
        temporary.replace(to)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _describe(bundle: Bundle, trial: Trial) -> Row:
    names = ("started_utc", "load_ns", "warmed_up", "threads", "peak_rss_bytes", "runtime_rss_bytes", "retries")
    return {name: getattr(trial, name) for name in (*names, "artifact_sha256")} | {
        "samples": len(trial.samples_ns),
        "median_ns": float(median(trial.samples_ns)) if trial.samples_ns else None,
        "cold_ns": trial.warmup_ns[0] if trial.warmup_ns else None,
        "runtime": trial.runtime.name,
        "runtime_version": trial.runtime.version,
        "governor": trial.before.governor,
        "temperature_before_mc": trial.before.temperature_mc,
        "temperature_after_mc": trial.after.temperature_mc,
        "build_sha256": bundle.header.build_sha256,
        "reasons": "; ".join(name_distrust([trial], bundle.trials)) or None,
    }


@contextmanager
def _write_csv(path: Path, columns: dict[str, str]) -> Iterator[Write]:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        yield writer.writerows


@contextmanager
def _write_parquet(path: Path, columns: dict[str, str]) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise InputError("Parquet needs the Python package pyarrow", hint="pip install 'rankship[notebook]'") from None
    kinds: dict[str, Any] = {"bool": pa.bool_(), "int32": pa.int32(), "int64": pa.int64()}
    kinds |= {"float64": pa.float64(), "string": pa.string()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def write(rows: Iterable[Row]) -> None:
            listed = list(rows)
            if listed:
                writer.write_table(pa.Table.from_pylist(listed, schema=schema))

        yield write


_WRITERS = {".parquet": _write_parquet, ".csv": _write_csv}
