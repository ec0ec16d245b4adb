"""The requests for one measurement and for one text, and the result of loading an artifact without running it."""

from rankship_pipeline.foundation.artifact_key import ArtifactKey, Delegate
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.generation import Generation
from rankship_targets.trials.trial import RuntimeReading


@record
class InferWay:
    """How samples are run: `rows` at once, and asked of the runtime is a `delegate` (None: what it does by itself)."""

    threads: int = 1
    rows: int = 1
    generation: Generation | None = None
    delegate: Delegate | None = None


@record
class MeasureRequest:
    """What to time: a pushed artifact, its inputs, of which the first sample is used, and for how long.

    The timed loop ends when both `min_samples` and `min_duration_ms` are reached; the warm-up when it is steady or
    `max_warmup_ms` are spent. With `idle_ms` the device rests that long before and after, so that a meter records it.
    Of a file that generates, the key's part says what one timed inference is: the first `generation.prompt_tokens`
    tokens of the input, or one of the others after them. Between inferences of a part of a model, `beside_bytes` of
    other memory are read, as the rest of the model would be.
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
    generation: Generation | None = None
    beside_bytes: int = 0


@record
class GenerateRequest:
    """What to continue and how far: `prompt` is a pushed file of token ids (1, n)."""

    key: ArtifactKey
    artifact: str
    artifact_sha256: str
    prompt: str
    threads: int
    new_tokens: int
    generation: Generation


@record
class LoadReading:
    """The time to load an artifact, and the process's resident memory with the runtime alone and with the artifact."""

    load_ns: int
    runtime_rss_bytes: int | None
    loaded_rss_bytes: int | None
    runtime: RuntimeReading
