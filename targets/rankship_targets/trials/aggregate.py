"""The record of one run of LiteRT's `benchmark_model`: figures of many inferences, without a single sample."""

from typing import Literal

from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.frozen import record

Share = Literal["completely", "partially", "not"]


@record
class BenchmarkSummary:
    """The program's figures for its timed inferences, in whole nanoseconds from its microseconds, without raw samples.

    `delegated` is how much of the graph each delegate runs, as far as the program reports it; `median_ns` is None for
    releases that do not print it, `std_ns` if every inference took equally long.
    """

    count: int
    mean_ns: int
    min_ns: int
    max_ns: int
    std_ns: int | None
    median_ns: int | None
    init_ns: int
    first_ns: int
    delegated: dict[str, Share]


@record
class Aggregate:
    """One run of the program, started by the device's shell, on one artifact; no trial, since it has no samples.

    `binary_sha256` is the program's. The delegate's outputs were compared with nothing: the program does not give them.
    """

    round: int
    key: ArtifactKey
    artifact_sha256: str
    device: str
    started_utc: str
    threads: int
    summary: BenchmarkSummary
    binary_sha256: str

    @property
    def share(self) -> Share:
        """How much of the graph the key's delegate ran; "not" where nothing shows that it ran any."""
        return self.summary.delegated.get(self.key.delegate.upper(), "not")
