"""Makes a session's requests to the agent, and a trial of the agent's events; nothing here uses a connection."""

from collections.abc import Mapping, Sequence

from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.generation import Generation
from rankship_targets.client.calls import pick
from rankship_targets.client.detached import Ticket
from rankship_targets.devices.device import Device
from rankship_targets.trials.events import Event, Idle, Loaded, Opened, Samples, Settled, State, Warmed
from rankship_targets.trials.request import GenerateRequest, InferWay, MeasureRequest
from rankship_targets.trials.trial import Conditions, Span, Trial

LONGEST_COOLING_S = 900.0
AgentRequest = dict[str, object]


def ask_to_infer(
    artifact_format: Format, artifact: str, inputs: Sequence[str], output: str, way: InferWay
) -> AgentRequest:
    """Return the request to run every sample; the agent writes `output`.0.npy and so on."""
    return {
        "command": "infer",
        "format": artifact_format,
        "artifact": artifact,
        "inputs": list(inputs),
        "output": output,
        "threads": way.threads,
        **({} if way.rows == 1 else {"rows": way.rows}),
        **_limit_tokens(way.generation),
        **_name_delegate(way.delegate),
    }


def ask_to_generate(request: GenerateRequest) -> AgentRequest:
    """Return the request to generate tokens after a prompt."""
    return {
        "command": "generate",
        "format": request.key.format,
        "artifact": request.artifact,
        "inputs": [request.prompt],
        "threads": request.threads,
        "new_tokens": request.new_tokens,
        "ends": list(request.generation.ends),
        **_limit_tokens(request.generation),
        **_name_delegate(request.key.asked),
    }


def _limit_tokens(generation: Generation | None) -> AgentRequest:
    if generation is None:
        return {}
    return {"generation": {"prompt_tokens": generation.prompt_tokens, "context": generation.context}}


def _name_delegate(delegate: Delegate | None) -> AgentRequest:
    return {} if delegate is None else {"delegate": delegate}


def ask_to_inspect(request: MeasureRequest) -> AgentRequest:
    """Return the request to say what the delegate takes of an artifact."""
    return {
        "command": "inspect",
        "format": request.key.format,
        "artifact": request.artifact,
        "inputs": list(request.inputs),
        "threads": request.threads,
        **_name_delegate(request.key.asked),
    }


def ask_to_measure(request: MeasureRequest, device: Device) -> AgentRequest:
    """Return the request to time an artifact under the conditions of the inventory."""
    return {
        "command": "measure",
        "format": request.key.format,
        "artifact": request.artifact,
        "inputs": list(request.inputs),
        "threads": request.threads,
        "min_samples": request.min_samples,
        "min_duration_ms": request.min_duration_ms,
        "max_warmup_ms": request.max_warmup_ms,
        "cpus": None if device.cpus is None else list(device.cpus),
        "cool_below_mc": device.cool_below_mc,
        "max_cooling_ms": round(LONGEST_COOLING_S * 1000),
        **({} if request.idle_ms is None else {"idle_ms": request.idle_ms}),
        **_name_delegate(request.key.asked),
        **_list_own(request),
    }


def _list_own(request: MeasureRequest) -> AgentRequest:
    """What only some artifacts have: a phase of generating, memory that is read beside them."""
    phase = request.key.phase
    return {
        **_limit_tokens(request.generation),
        **({} if phase is None else {"phase": phase}),
        **({"beside_bytes": request.beside_bytes} if request.beside_bytes else {}),
    }


def ask_to_sweep(requests: Sequence[MeasureRequest], device: Device) -> AgentRequest:
    """Return the request to time several artifacts in one process; the rest is taken from the first request."""
    asked, own = ask_to_measure(requests[0], device), [_list_own(one) for one in requests]
    return {
        **{name: value for name, value in asked.items() if name != "artifact" and name not in own[0]},
        "command": "sweep",
        "artifacts": [one.artifact for one in requests],
        "inputs": [list(one.inputs) for one in requests],
        **({"own": own} if any(own) else {}),
    }


def ask_to_profile(request: MeasureRequest, runs: int) -> AgentRequest:
    """Return the request to profile `runs` inferences of an artifact."""
    return {
        "command": "profile",
        "format": request.key.format,
        "artifact": request.artifact,
        "inputs": list(request.inputs),
        "threads": request.threads,
        "runs": runs,
    }


def limit_duration(request: MeasureRequest, device: Device) -> float:
    """Return the seconds after which a measurement has failed, including the time to cool down if required."""
    return request.timeout_s + (0.0 if device.cool_below_mc is None else LONGEST_COOLING_S)


def read_trial(
    request: MeasureRequest,
    events: Sequence[Event],
    ticket: Ticket,
    device: Device,
    *,
    agent_sha256: str,
    retries: int,
    unmet: tuple[str, ...],
) -> Trial:
    """Make a trial of the agent's events; `unmet` are the conditions that could not be set before it started."""
    opened, warmed = pick(events, Opened, device), pick(events, Warmed, device)
    settled, samples = pick(events, Settled, device), pick(events, Samples, device)
    states: Mapping[str, list[State]] = {
        when: [one for one in events if isinstance(one, State) and one.when == when] for when in ("before", "after")
    }
    return Trial(
        round=request.round,
        key=request.key,
        artifact_sha256=request.artifact_sha256,
        device=device.name,
        started_utc=ticket.started_utc,
        threads=request.threads,
        load_ns=pick(events, Loaded, device).load_ns,
        warmup_ns=warmed.ns,
        warmed_up=warmed.steady,
        samples_ns=samples.ns,
        peak_rss_bytes=warmed.peak_rss_bytes,
        runtime_rss_bytes=opened.rss_bytes,
        runtime=opened.runtime,
        before=pick(states["before"], State, device).state,
        after=pick(states["after"], State, device).state,
        agent_sha256=agent_sha256,
        retries=retries,
        conditions=Conditions(cpus=settled.cpus, cooling_ms=settled.cooling_ms, unmet=(*unmet, *settled.unmet)),
        loop=_read_loop(samples),
        waited_ns=samples.waited_ns,
        idle=tuple(Span(start_ns=one.start_ns, end_ns=one.end_ns) for one in events if isinstance(one, Idle)),
    )


def _read_loop(samples: Samples) -> Span | None:
    if samples.start_ns is None or samples.end_ns is None:
        return None
    return Span(start_ns=samples.start_ns, end_ns=samples.end_ns)
