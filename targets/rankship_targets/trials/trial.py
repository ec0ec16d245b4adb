"""What one measurement on a device leaves behind: every raw sample and the conditions it was taken under."""

from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.records import record
from rankship_targets.trials.trace import PowerTrace


@record
class DeviceState:
    """A device's condition at one moment; None where the device does not tell.

    `clock_offset_ns` is the wall clock less the monotonic one: it moves where the clock is set, and where the device
    slept. `throttled_bits` are a Raspberry Pi firmware's (bits 0 to 3 now, 16 to 19 since boot), `throttle_count` the
    events that x86 kernels count since boot, `cooling_steps` how far the kernel has turned the processors down now.
    """

    governor: str | None
    frequency_khz: tuple[int, ...] | None
    temperature_mc: int | None
    load_1m_milli: int | None
    available_memory_bytes: int | None
    boot_id: str | None = None
    uptime_ms: int | None = None
    clock_offset_ns: int | None = None
    throttled_bits: int | None = None
    throttle_count: int | None = None
    cooling_steps: int | None = None
    battery_percent: int | None = None
    charging: bool | None = None


@record
class Conditions:
    """What was settled on the device before a trial.

    `cpus` are the cores that the process could run on, None where that is not known. `unmet` says, one phrase each,
    what the inventory asks for and could not be had: "governor performance: Permission denied".
    """

    cpus: tuple[int, ...] | None = None
    cooling_ms: int = 0
    unmet: tuple[str, ...] = ()


@record
class RuntimeReading:
    """A runtime as the agent found it on the device."""

    name: str
    version: str
    python: str
    machine: str
    kernel: str


@record
class Span:
    """A stretch of the device's monotonic clock."""

    start_ns: int
    end_ns: int

    @property
    def length_ns(self) -> int:
        """Its length."""
        return self.end_ns - self.start_ns


@record
class Trial:
    """One artifact timed once on one device, in a fresh process.

    `samples_ns` are single inferences in the order they were taken, after warm-up; `warmup_ns` are the ones before
    (the first is the cold inference). `load_ns` is opening the file to being ready; `peak_rss_bytes` is the process's
    peak resident memory after load and warm-up, `runtime_rss_bytes` the resident memory with the runtime imported
    and no model loaded. `retries` counts transient target errors met on the way. `loop` is when the samples were taken
    (None: a runner that does not tell), `idle` the rests before and after the trial, where it was asked to rest.
    `waited_ns` is how long in `loop` the thread that timed was ready to run but waited for a processor (None: untold).
    """

    round: int
    key: ArtifactKey
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
    conditions: Conditions = Conditions()
    loop: Span | None = None
    idle: tuple[Span, ...] = ()
    waited_ns: int | None = None


@record
class MeteredTrial:
    """A trial and all that the meter read meanwhile; `trace_sha256` is the digest of the trace.

    Its samples are no latencies: a meter that the device itself reads takes time from what is measured.
    """

    trial: Trial
    trace: PowerTrace
    trace_sha256: str
