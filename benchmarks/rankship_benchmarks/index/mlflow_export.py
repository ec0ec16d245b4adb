"""Logs runs to an MLflow tracking server: one MLflow run per bundle, metrics per case, with the medians' intervals."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rankship_benchmarks.bundle.bundle import Bundle, open_bundle
from rankship_benchmarks.judge.energy_figures import name_meters
from rankship_benchmarks.judge.summary import Result, summarise
from rankship_benchmarks.stats.estimates import Estimate
from rankship_pipeline.foundation.errors import InputError, MeasurementError
from rankship_pipeline.foundation.quality import ACCURACY

_TAG = "rankship.run_id"


def log_bundles(folders: Sequence[Path], uri: str) -> tuple[int, tuple[str, ...]]:
    """Log every run that is not there yet; returns their number, and the runs that must not be used, with reasons.

    A run is identified by its tag, so that exporting again adds nothing. The experiment is named after the recipe.
    """
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError:
        hint = "pip install 'rankship[mlflow]', in an environment without the tflite extra"
        raise InputError("this export needs the Python package mlflow", hint=hint) from None
    client, logged, refused = MlflowClient(tracking_uri=uri), 0, []
    for folder in folders:
        bundle = open_bundle(folder)
        header = bundle.header
        experiment = client.get_experiment_by_name(header.recipe)
        number = experiment.experiment_id if experiment else client.create_experiment(header.recipe)
        if client.search_runs([number], filter_string=f"tags.`{_TAG}` = '{header.run_id}'", max_results=1):
            continue
        try:
            metrics = list_metrics(bundle)
        except MeasurementError as failure:
            refused.append(f"{header.run_id}: {failure}")
            continue
        moment_ms = round(1000 * datetime.fromisoformat(header.created_utc).timestamp())
        run = client.create_run(number, start_time=moment_ms, tags={_TAG: header.run_id}, run_name=header.run_id)
        for name, value in list_parameters(bundle).items():
            client.log_param(run.info.run_id, name, value)
        for name, number_value in metrics.items():
            client.log_metric(run.info.run_id, name, number_value, timestamp=moment_ms)
        client.set_terminated(run.info.run_id, end_time=moment_ms)
        logged += 1
    return logged, tuple(refused)


def list_parameters(bundle: Bundle) -> dict[str, str]:
    """List a run's conditions as MLflow parameters."""
    header = bundle.header
    named = {"device": header.device, "build_sha256": header.build_sha256, "suite_sha256": header.suite_sha256}
    named |= {"rounds": str(header.rounds), "rankship": header.rankship_version}
    if bundle.metered:  # an energy figure always comes with its meter and provenance
        named["energy meter"] = ", ".join(f"{name} {provenance}" for name, provenance in name_meters(bundle.metered))
    return named | {f"condition {name}": value for name, value in header.conditions.items()}


def list_metrics(bundle: Bundle) -> dict[str, float]:
    """List each case's numbers as metrics; what was not measured has none."""
    return {
        f"{one.key.format}.{one.key.model.replace(', ', '.')}.{name}": float(value)
        for one in summarise(bundle).results
        for name, value in _list_numbers(one).items()
        if value is not None
    }


def _list_numbers(one: Result) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {
        "size_bytes": one.size_bytes,
        "parameters": one.parameters,
        "accuracy" if one.accuracy is None or one.accuracy.measure == ACCURACY else "score": (
            one.accuracy.value if one.accuracy else None
        ),
        "peak_rss_bytes": one.peak_rss_bytes,
    }
    estimates: dict[str, Estimate | None] = {
        "latency_ns": one.latency_ns,
        "ratio": one.ratio,
        "load_ns": one.load_ns,
        "cold_ns": one.cold_ns,
        "energy_ratio": one.energy.ratio if one.energy else None,
    }
    for name, estimate in estimates.items():
        if estimate is not None:
            numbers |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    energies = {"energy": one.energy.total, "marginal": one.energy.marginal} if one.energy else {}
    for name, energy in energies.items():
        if energy is not None:
            numbers |= {f"{name}_nj": energy.value_nj, f"{name}_uncertainty_nj": energy.uncertainty_nj}
    return numbers
