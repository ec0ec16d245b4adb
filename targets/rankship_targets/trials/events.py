"""The events that the agent sends, one record each; only `read_event` parses them."""

import json
from typing import Any, Literal

from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.errors import AgentMismatch, InputError
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record
from rankship_targets.trials.trace import Offer
from rankship_targets.trials.trial import DeviceState, RuntimeReading

PROTOCOL = 2
_SHOWN_CHARACTERS = 120
_HINT = "the agent on the device and this host must be of the same release: reconnect, and the agent is copied again"


FaultKind = Literal[
    "lacks_runtime",
    "bad_artifact",
    "bad_request",
    "bad_input",
    "failed",
    "no_space",
    "read_only",
    "busy",
    "unknown_run",
    "agent_died",
    "rebooted",
]


@record
class Hello:
    """The agent's first event."""

    event: Literal["hello"]
    protocol: int


@record
class Probe:
    """A device as its agent describes it; a runtime is (name, version), None if none for the format is installed.

    `throttled` are the bits of a Raspberry Pi's `vcgencmd get_throttled`; `userland_bits` is the interpreter's word
    size, which may differ from the kernel's; `clock_utc_ns` is the device's clock at that moment; `temperature_of`
    names the sensor that is believed, or says why none is, `temperature_doubts` says why others are not; `managed` is
    whether its Python takes no packages from pip (PEP 668).
    """

    event: Literal["probe"]
    python: str
    machine: str
    kernel: str
    cpu_count: int
    cpu_model: str | None
    memory_bytes: int | None
    free_bytes: int
    runtimes: dict[Format, tuple[str, str] | None]
    numpy: str | None
    psutil: str | None
    state: DeviceState
    userland_bits: int | None = None
    throttled: int | None = None
    swap_used_bytes: int | None = None
    cpus_online: tuple[int, ...] | None = None
    battery_status: str | None = None
    clock_utc_ns: int | None = None
    managed: bool | None = None
    temperature_of: str = ""
    temperature_doubts: tuple[str, ...] = ()


@record
class State:
    """The device's condition before or after the timed loop."""

    event: Literal["state"]
    when: Literal["before", "after"]
    state: DeviceState


@record
class Opened:
    """The runtime is imported; `rss_bytes` is the process's resident memory at that moment."""

    event: Literal["opened"]
    runtime: RuntimeReading
    rss_bytes: int | None


@record
class Loaded:
    """The artifact is loaded; `rss_bytes` is the process's resident memory at that moment."""

    event: Literal["loaded"]
    load_ns: int
    rss_bytes: int | None = None


@record
class Cooling:
    """The device is still too warm to be measured."""

    event: Literal["cooling"]
    temperature_mc: int


@record
class Settled:
    """The conditions are set, except for those in `unmet`; `cpus` are the cores that the process may run on."""

    event: Literal["settled"]
    cpus: tuple[int, ...]
    cooling_ms: int
    unmet: tuple[str, ...]


@record
class Tuned:
    """The frequency governor after setting it, and the reasons (`unmet`) if it is not the one wanted."""

    event: Literal["tuned"]
    governor: str | None
    unmet: tuple[str, ...]


@record
class Spooled:
    """A detached run is going on or finished; `born` differs each time that a run of this name is started."""

    event: Literal["spooled"]
    born: str


@record
class Warmed:
    """The warm-up is over: its times were steady, or its time budget was spent."""

    event: Literal["warmed"]
    ns: tuple[int, ...]
    steady: bool
    peak_rss_bytes: int | None


@record
class Samples:
    """Every timed inference in order.

    `start_ns` and `end_ns` are the ends of the timed loop on the monotonic clock; None from an older kit's runner.
    `waited_ns` is how long the timing thread was ready to run but waited for a processor during the loop; None if the
    kernel does not count it, and from a kit's runner.
    """

    event: Literal["samples"]
    ns: tuple[int, ...]
    start_ns: int | None = None
    end_ns: int | None = None
    waited_ns: int | None = None


@record
class Generated:
    """The tokens after a prompt, the likeliest each time; `first_ns` includes the prompt, `ns` are the others' times.

    The last token is one that ends a text, unless the context was full or no more were asked for.
    """

    event: Literal["generated"]
    tokens: tuple[int, ...]
    first_ns: int
    ns: tuple[int, ...]
    peak_rss_bytes: int | None


@record
class Idle:
    """The device rested before or after the timed loop, between these instants of its monotonic clock."""

    event: Literal["idle"]
    when: Literal["before", "after"]
    start_ns: int
    end_ns: int


@record
class Delegates:
    """The delegates that a format's runtime has on the device."""

    event: Literal["delegates"]
    known: tuple[Delegate, ...]


@record
class Taken:
    """What a delegate took of a file: operators in so many partitions; `left` has how many of each kind it did not."""

    event: Literal["taken"]
    partitions: int
    operators: int
    left: dict[str, int]


@record
class OperatorTime:
    """One operator under the runtime's own profiler: `name` as the runtime gives it, `ns` for each inference."""

    name: str
    kind: str
    ns: tuple[int, ...]


@record
class Profiled:
    """Every operator in running order, and the time of each whole inference, the profiler's included."""

    event: Literal["profiled"]
    operators: tuple[OperatorTime, ...]
    inference_ns: tuple[int, ...]


@record
class Traced:
    """The ETDump that the ExecuTorch program wrote about its inferences, in base64."""

    event: Literal["traced"]
    etdump: str


@record
class Meters:
    """Every meter the agent knows, usable or not."""

    event: Literal["meters"]
    meters: tuple[Offer, ...]


@record
class Metering:
    """Reading of a meter began at `start_ns` of the device's monotonic clock."""

    event: Literal["metering"]
    meter: Offer
    start_ns: int


@record
class Readings:
    """The readings since the last batch: index of the channel, time, value (None: no reading)."""

    event: Literal["readings"]
    rows: tuple[tuple[int, int, int | None], ...]
    until_ns: int


@record
class Done:
    """The request was carried out; `outputs` counts the files that infer wrote."""

    event: Literal["done"]
    outputs: int = 0


@record
class Failure:
    """The request was not carried out; `kind` is the class of the fault."""

    event: Literal["error"]
    kind: FaultKind
    message: str


Event = (
    Hello
    | Probe
    | State
    | Opened
    | Loaded
    | Cooling
    | Settled
    | Tuned
    | Spooled
    | Warmed
    | Samples
    | Generated
    | Idle
    | Delegates
    | Taken
    | Profiled
    | Traced
    | Meters
    | Metering
    | Readings
    | Done
    | Failure
)
_RECORDS: dict[str, type[Event]] = {
    "hello": Hello,
    "probe": Probe,
    "state": State,
    "opened": Opened,
    "loaded": Loaded,
    "cooling": Cooling,
    "settled": Settled,
    "tuned": Tuned,
    "spooled": Spooled,
    "warmed": Warmed,
    "samples": Samples,
    "generated": Generated,
    "idle": Idle,
    "delegates": Delegates,
    "taken": Taken,
    "profiled": Profiled,
    "traced": Traced,
    "meters": Meters,
    "metering": Metering,
    "readings": Readings,
    "done": Done,
    "error": Failure,
}


def read_event(line: str) -> Event:
    """Parse one line of the protocol; AgentMismatch, showing the line, if it is not an event."""
    try:
        thing: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise AgentMismatch(f"the agent sent {_shorten(line)}, which is not JSON", hint=_HINT) from None
    name = thing.get("event") if isinstance(thing, dict) else None
    if not isinstance(name, str) or name not in _RECORDS:
        raise AgentMismatch(f"the agent sent {_shorten(line)}, which is not a known event", hint=_HINT)
    if name == "hello" and thing.get("protocol") != PROTOCOL:
        message = f"the agent uses protocol {_shorten(str(thing.get('protocol')))}, this host uses {PROTOCOL}"
        raise AgentMismatch(message, hint=_HINT)
    try:
        return decode(_RECORDS[name], line, where=f"the agent's event {name!r}")
    except (InputError, ValueError, RecursionError) as failure:
        raise AgentMismatch(f"{failure}: {_shorten(line)}", hint=_HINT) from None


def _shorten(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")
