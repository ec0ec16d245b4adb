"""What one measurement asks for, and what loading alone told."""

from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.records import record
from rankship_targets.trials.trial import RuntimeReading


@record
class MeasureRequest:
    """What to time: a pushed artifact, the inputs whose first sample it gets, and for how long.

    The timed loop ends when both `min_samples` and `min_duration_ms` are reached; the warm-up when it is steady or
    `max_warmup_ms` are spent. With `idle_ms` the device rests that long before and after, for a meter to see.
    """

    round: int
    key: ArtifactKey
    artifact: str
    artifact_sha256: str
    inputs: tuple[str, ...]
    threads: int
    min_samples: int
    min_duration_ms: int
    max_warmup_ms: int
    timeout_s: float = 900.0
    idle_ms: int | None = None


@record
class LoadReading:
    """What loading an artifact took; memory is the process's resident one with the runtime alone, and loaded."""

    load_ns: int
    runtime_rss_bytes: int | None
    loaded_rss_bytes: int | None
    runtime: RuntimeReading
