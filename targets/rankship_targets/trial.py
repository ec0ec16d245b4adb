"""What one measurement on a device leaves behind: every raw sample and the conditions it was taken under."""

from rankship_pipeline.records import Format, Variant, record


@record
class DeviceState:
    """A device's condition at one moment; None where the device does not tell."""

    governor: str | None
    frequency_khz: tuple[int, ...] | None
    temperature_mc: int | None
    load_1m_milli: int | None
    available_memory_bytes: int | None


@record
class RuntimeReading:
    """A runtime as the agent found it on the device."""

    name: str
    version: str
    python: str
    machine: str
    kernel: str


@record
class Trial:
    """One artifact timed once on one device, in a fresh process.

    `samples_ns` are single inferences in the order they were taken, after warm-up; `warmup_ns` are the ones before
    (the first is the cold inference). `load_ns` is opening the file to being ready; `peak_rss_bytes` is the process's
    peak resident memory after load and warm-up, `runtime_rss_bytes` the resident memory with the runtime imported
    and no model loaded. `retries` counts transient target errors met on the way.
    """

    round: int
    variant: Variant
    format: Format
    artifact_sha256: str
    device: str
    started_utc: str
    threads: int
    load_ns: int
    warmup_ns: tuple[int, ...]
    warmed_up: bool
    samples_ns: tuple[int, ...]
    peak_rss_bytes: int | None
    runtime_rss_bytes: int | None
    runtime: RuntimeReading
    before: DeviceState
    after: DeviceState
    agent_sha256: str
    retries: int
