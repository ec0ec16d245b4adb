"""The index's tables: columns to query over many runs, derived from their bundles."""

from dataclasses import fields

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

from rankship_pipeline.foundation.artifact_key import ArtifactKey

# Incremented whenever a column changes: an index of another version is dropped and rebuilt.
VERSION = 4

METADATA = MetaData()


def _name_artifact() -> list[Column[str]]:
    """Return the columns of an artifact's key, one per field."""
    return [Column(one.name, String, primary_key=True) for one in fields(ArtifactKey)]


# `source` is the host and results folder of a run, so that many hosts can share one index.
RUNS = Table(
    "runs",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("source", String, nullable=False),
    Column("folder", String, nullable=False),
    Column("file_sha256", String(64), nullable=False),
    Column("damage", String),  # why the bundle cannot be read; then all following columns are null
    Column("run_id", String, index=True),
    Column("created_utc", String),
    Column("finished", Boolean),
    Column("device", String, index=True),
    Column("recipe", String),
    Column("recipe_sha256", String(64)),
    Column("build_sha256", String(64)),
    Column("suite_sha256", String(64)),
    Column("rounds", Integer),
    Column("rankship_version", String),
    Column("conditions", JSON),
    UniqueConstraint("source", "folder"),
)
# One artifact in one run. Latency is the median over valid rounds with its 95 % interval, null without one. Energy is
# an inference's, in total and above idle, with its ± (energy_figures.EnergyEstimate); null if it is not supported.
CASES = Table(
    "cases",
    METADATA,
    Column("run", ForeignKey("runs.id"), primary_key=True),
    *_name_artifact(),
    Column("artifact_sha256", String(64)),
    Column("size_bytes", BigInteger),
    Column("parameters", BigInteger),
    Column("accuracy_correct", Integer),
    Column("accuracy_samples", Integer),
    Column("score", Float),
    Column("score_low", Float),
    Column("score_high", Float),
    Column("score_measure", String),
    Column("score_unit", String),  # "%" of a share, which is kept as 0 to 1
    Column("runtime", String),
    Column("runtime_version", String),
    Column("threads", Integer),
    Column("valid_rounds", Integer),
    Column("latency_ns", Float),
    Column("latency_low_ns", Float),
    Column("latency_high_ns", Float),
    Column("meter", String),
    Column("provenance", String),  # measured, counter or modelled
    Column("energy_rounds", Integer),
    Column("energy_nj", BigInteger),
    Column("energy_uncertainty_nj", BigInteger),
    Column("marginal_nj", BigInteger),
    Column("marginal_uncertainty_nj", BigInteger),
)
TRIALS = Table(
    "trials",
    METADATA,
    Column("run", ForeignKey("runs.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    *_name_artifact(),
    Column("started_utc", String),
    Column("samples", Integer),
    Column("median_ns", Float),
    Column("load_ns", BigInteger),
    Column("cold_ns", BigInteger),
    Column("warmed_up", Boolean),
    Column("peak_rss_bytes", BigInteger),
    Column("runtime_rss_bytes", BigInteger),
    Column("retries", Integer),
    Column("valid", Boolean),  # it counts in its own run's report
    Column("trusted", Boolean),  # and verdicts between runs may use it
)
# Why a trial does not count, or why no verdict may use it; see validity.RULES.
REASONS = Table(
    "reasons",
    METADATA,
    Column("run", ForeignKey("runs.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    *_name_artifact(),
    Column("reason", String, primary_key=True),
)
VERSIONS = Table("rankship_index", METADATA, Column("version", Integer, primary_key=True))
# Children first: the order of deletion.
BY_RUN = (REASONS, TRIALS, CASES)
