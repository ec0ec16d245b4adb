"""A working session on one device: connected, held by a lease, with the agent in place."""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rankship_pipeline.foundation.errors import (
    AgentDied,
    BuildError,
    CommandFailed,
    ManifestRefused,
    PersistentTargetError,
    TargetError,
)
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import Format, Verified
from rankship_targets.client.agent_file import find_agent
from rankship_targets.client.calls import call_agent, pick, split_turns
from rankship_targets.client.connect import open_transport
from rankship_targets.client.detached import DetachedRuns, Ticket, make_ticket
from rankship_targets.client.etdump import read_etdump
from rankship_targets.devices.device import Device
from rankship_targets.devices.meter_choice import MeterChoice
from rankship_targets.meters.meter import Meter, Reach, open_meter
from rankship_targets.session.greeting import greet
from rankship_targets.session.manifest import SUFFIX as MANIFEST_SUFFIX
from rankship_targets.session.manifest import check_pushed, manifest_path, read_manifest
from rankship_targets.transport.copying import OnProgress, copy_verified, remove_old_parts
from rankship_targets.transport.lease import STALE_S, Lease, describe_owner
from rankship_targets.transport.link import Link
from rankship_targets.transport.protocol import STEP_TIMEOUT_S, Transport, hash_many, run_checked
from rankship_targets.trials.events import (
    Done,
    Event,
    Idle,
    Loaded,
    Opened,
    Probe,
    Profiled,
    Samples,
    Settled,
    State,
    Traced,
    Tuned,
    Warmed,
)
from rankship_targets.trials.request import LoadReading, MeasureRequest
from rankship_targets.trials.trial import Conditions, RuntimeReading, Span, Trial

SUFFIXES: dict[Format, str] = {"onnx": "onnx", "tflite": "tflite", "executorch": "pte"}
INFER_TIMEOUT_S = 600.0
LONGEST_COOLING_S = 900.0


def stay_silent(_: str) -> None:
    """Tell nobody."""


@contextmanager
def open_session(
    device: Device,
    *,
    connect: Callable[[Device], Transport] = open_transport,
    lease_stale_s: int = STALE_S,
    on_news: Callable[[str], None] = stay_silent,
) -> Iterator["Session"]:
    """Connect, take the lease and put the agent in place; `on_news` hears of long waits on the device.

    What measuring sets on the device is restored, and the lease given back, on every way out.
    """
    link = Link(device, connect, on_news)
    try:
        workdir, left_tuned = link.call(lambda transport: greet(transport, device))
        lease = Lease(device=device, folder=f"{workdir}/lease", owner=describe_owner(), stale_s=lease_stale_s)
        link.call(lease.take)
        try:
            session = Session(device, link, lease, workdir, on_news, connect)
            with session.restoring(at_once=left_tuned and device.governor is None, at_end=left_tuned):
                yield session
        finally:
            lease.give_up()
            with suppress(TargetError):  # where the way to it is gone, the lease goes stale by itself
                link.call(lease.release)
    finally:
        link.close()


class Session:
    """Everything that may be done with a device that is held; made by `open_session`."""

    def __init__(
        self,
        device: Device,
        link: Link,
        lease: Lease,
        workdir: str,
        on_news: Callable[[str], None],
        connect: Callable[[Device], Transport],
    ) -> None:
        self.device = device
        self._connect = connect
        self.agent_sha256 = hash_file(find_agent())
        self._link = link
        self._lease = lease
        self._workdir = workdir
        self._verified: dict[str, str] = {}
        self._tuned = False
        self._unmet: tuple[str, ...] = ()
        self._agent = self._copy(find_agent(), self.agent_sha256, f"agents/{self.agent_sha256}.pyz")
        self._link.call(lambda transport: remove_left(transport, workdir))
        self._runs = DetachedRuns(device, link, self._agent, workdir, on_news)

    @contextmanager
    def restoring(self, *, at_once: bool, at_end: bool) -> Iterator[None]:
        """Restore the governor on the way out if it was set, or was left set by a session that never ended."""
        if at_once:
            self._link.call(self._restore)
        self._tuned = at_end and not at_once
        try:
            yield
        finally:
            if self._tuned:
                with suppress(TargetError):  # where the way to it is gone, the next session restores it
                    self._link.call(self._restore)

    def probe(self) -> Probe:
        """Ask the agent what the device is and has."""
        request = {"command": "probe", "workdir": self._workdir}
        return pick(
            self._link.call(lambda link: self._ask(link, request, STEP_TIMEOUT_S), patient=True), Probe, self.device
        )

    def push(self, artifact: Path, verified: Verified, *, on_progress: OnProgress | None = None) -> str:
        """Copy an artifact that was proven and signed, and no other; gives its path on the device.

        BuildError where it is not the file that was proven, ManifestRefused where this user did not sign that.
        """
        sha256 = hash_file(artifact)
        if sha256 != verified.artifact_sha256:
            message = f"{artifact} has SHA-256 {sha256}, verified was {verified.artifact_sha256}: nothing was pushed"
            raise BuildError(message, hint="the file changed after `rankship verify`: build and verify again")
        manifest = read_manifest(artifact)
        if manifest.verified != verified:
            message = f"{manifest_path(artifact)} is signed for another proof: nothing was pushed"
            raise ManifestRefused(message, hint="`rankship verify` with the same recipe signs anew")
        name = f"artifacts/{sha256}/model.{SUFFIXES[verified.key.format]}"
        remote = self._copy(artifact, sha256, name, on_progress)
        note = manifest_path(artifact)
        self._copy(note, hash_file(note), name + MANIFEST_SUFFIX)
        self._link.call(lambda transport: check_pushed(transport, remote, manifest))
        self._verified[remote] = sha256
        return remote

    def push_file(self, path: Path, *, on_progress: OnProgress | None = None) -> str:
        """Copy any other file, named by its content; gives its path on the device."""
        sha256 = hash_file(path)
        return self._copy(path, sha256, f"files/{sha256}{path.suffix}", on_progress)

    def infer(
        self, artifact_format: Format, artifact: str, inputs: Sequence[str], into: Path, threads: int = 1
    ) -> tuple[list[Path], RuntimeReading]:
        """Run every sample on the device and bring one .npy file per output home, samples stacked on axis 0."""
        folder = f"{self._workdir}/outputs/{secrets.token_hex(8)}"
        request = {
            "command": "infer",
            "format": artifact_format,
            "artifact": artifact,
            "inputs": list(inputs),
            "output": f"{folder}/output",
            "threads": threads,
        }

        def step(transport: Transport) -> tuple[list[Path], RuntimeReading]:
            run_checked(transport, ["mkdir", "-p", "--", folder])
            try:
                events = self._ask(transport, request, INFER_TIMEOUT_S)
                count = pick(events, Done, self.device).outputs
                files = [into / f"output.{position}.npy" for position in range(count)]
                for file in files:
                    transport.fetch(f"{folder}/{file.name}", file)
            finally:
                with suppress(TargetError):
                    run_checked(transport, ["rm", "-rf", "--", folder])
            return files, pick(events, Opened, self.device).runtime

        return self._link.call(step, retry_timeouts=False, patient=True)

    def load(self, artifact_format: Format, artifact: str, threads: int = 1) -> LoadReading:
        """Load an artifact in a fresh process and run nothing."""
        request = {"command": "load", "format": artifact_format, "artifact": artifact, "threads": threads}
        events = self._link.call(
            lambda link: self._ask(link, request, INFER_TIMEOUT_S), retry_timeouts=False, patient=True
        )
        opened, loaded = pick(events, Opened, self.device), pick(events, Loaded, self.device)
        return LoadReading(
            load_ns=loaded.load_ns,
            runtime_rss_bytes=opened.rss_bytes,
            loaded_rss_bytes=loaded.rss_bytes,
            runtime=opened.runtime,
        )

    def measure(self, request: MeasureRequest, ticket: Ticket | None = None) -> Trial:
        """Time a pushed artifact in a fresh process; what was not pushed as verified is refused.

        The work goes on where the way to the device breaks, and is found again. With a `ticket` its result stays on
        the device until `forget`, for another process to find should this one die; what fails is forgotten at once.
        """
        self._refuse_unproven(request)
        retries_before, run = self._link.retries, ticket or make_ticket()
        cooling_s = 0.0 if self.device.cool_below_mc is None else LONGEST_COOLING_S
        try:
            events = self._runs.carry_out(
                run.run,
                self._word(request),
                request.timeout_s + cooling_s,
                lambda transport: self._prepare(transport, request),
            )
        except BaseException as failure:
            if ticket is None or isinstance(failure, PersistentTargetError | AgentDied):
                with suppress(TargetError):
                    self._runs.forget(run.run)
            raise
        trial = self._read_trial(request, run, events, self._link.retries - retries_before)
        if ticket is None:
            self._runs.forget(run.run)
        return trial

    def sweep(self, requests: Sequence[MeasureRequest]) -> list[Trial]:
        """Time several pushed artifacts one after the other in one fresh process; one trial each, in their order.

        All but artifact and inputs is alike in the requests. Memory is not on_progress: the artifacts share a process.
        """
        for request in requests:
            self._refuse_unproven(request)
        retries_before, run, first = self._link.retries, make_ticket(), requests[0]
        word: dict[str, object] = {**self._word(first), "command": "sweep"}
        del word["artifact"]
        word |= {"artifacts": [one.artifact for one in requests], "inputs": [list(one.inputs) for one in requests]}
        cooling_s = 0.0 if self.device.cool_below_mc is None else LONGEST_COOLING_S
        try:
            events = self._runs.carry_out(
                run.run, word, first.timeout_s + cooling_s, lambda transport: self._prepare(transport, *requests)
            )
            turns, retries = split_turns(events, len(requests), self.device), self._link.retries - retries_before
            trials = [self._read_trial(one, run, turn, retries) for one, turn in zip(requests, turns, strict=True)]
        finally:
            with suppress(TargetError):  # a week later the device removes it by itself
                self._runs.forget(run.run)
        return [replace(one, peak_rss_bytes=None, runtime_rss_bytes=None) for one in trials]

    def open_meter(self, choice: MeterChoice, limit_ms: int) -> Meter:
        """Make a meter that records beside what is measured here, for no longer than a limit."""
        return open_meter(choice, Reach(self.device, self._agent, self._connect, limit_ms))

    def profile(self, request: MeasureRequest, runs: int) -> Profiled:
        """Have the runtime's own profiler look at so many inferences of a pushed artifact; no latency comes of it."""
        self._refuse_unproven(request)
        kept = ("command", "format", "artifact", "inputs", "threads")
        word = {name: value for name, value in self._word(request).items() if name in kept}
        word |= {"command": "profile", "runs": runs}
        events = self._link.call(lambda link: self._ask(link, word, request.timeout_s), retry_timeouts=False)
        if any(isinstance(one, Traced) for one in events):
            return read_etdump(pick(events, Traced, self.device).etdump, runs)
        return pick(events, Profiled, self.device)

    def forget(self, ticket: Ticket) -> None:
        """End a measurement if it goes on, and remove what it left on the device."""
        self._runs.forget(ticket.run)

    def _refuse_unproven(self, request: MeasureRequest) -> None:
        if self._verified.get(request.artifact) != request.artifact_sha256:
            message = f"{request.artifact} was not pushed as verified in this session: nothing was measured"
            raise BuildError(message, hint="push(file, verified) gives the path to measure")

    def _read_trial(self, request: MeasureRequest, ticket: Ticket, events: Sequence[Event], retries: int) -> Trial:
        opened, warmed = pick(events, Opened, self.device), pick(events, Warmed, self.device)
        settled = pick(events, Settled, self.device)
        before, after = ([one for one in events if isinstance(one, State) and one.when == when] for when in _MOMENTS)
        samples = pick(events, Samples, self.device)
        return Trial(
            round=request.round,
            key=request.key,
            artifact_sha256=request.artifact_sha256,
            device=self.device.name,
            started_utc=ticket.started_utc,
            threads=request.threads,
            load_ns=pick(events, Loaded, self.device).load_ns,
            warmup_ns=warmed.ns,
            warmed_up=warmed.steady,
            samples_ns=samples.ns,
            peak_rss_bytes=warmed.peak_rss_bytes,
            runtime_rss_bytes=opened.rss_bytes,
            runtime=opened.runtime,
            before=pick(before, State, self.device).state,
            after=pick(after, State, self.device).state,
            agent_sha256=self.agent_sha256,
            retries=retries,
            conditions=Conditions(
                cpus=settled.cpus, cooling_ms=settled.cooling_ms, unmet=(*self._unmet, *settled.unmet)
            ),
            loop=_read_loop(samples),
            waited_ns=samples.waited_ns,
            idle=tuple(Span(start_ns=one.start_ns, end_ns=one.end_ns) for one in events if isinstance(one, Idle)),
        )

    def _word(self, request: MeasureRequest) -> dict[str, object]:
        """Say a request as the agent takes it, with the conditions that the inventory asks for."""
        return {
            "command": "measure",
            "format": request.key.format,
            "artifact": request.artifact,
            "inputs": list(request.inputs),
            "threads": request.threads,
            "min_samples": request.min_samples,
            "min_duration_ms": request.min_duration_ms,
            "max_warmup_ms": request.max_warmup_ms,
            "cpus": None if self.device.cpus is None else list(self.device.cpus),
            "cool_below_mc": self.device.cool_below_mc,
            "max_cooling_ms": round(LONGEST_COOLING_S * 1000),
            **({} if request.idle_ms is None else {"idle_ms": request.idle_ms}),
        }

    def _prepare(self, transport: Transport, *requests: MeasureRequest) -> None:
        """See that the device is still ours, holds the very files, and runs under the governor that is wanted."""
        self._lease.renew(transport)
        hashes = hash_many(transport, [request.artifact for request in requests])
        for request in requests:
            found = hashes.get(request.artifact)
            if found != request.artifact_sha256:
                message = f"{request.artifact} on {self.device.name} has SHA-256 {found}, not {request.artifact_sha256}"
                raise CommandFailed(message, hint="something changed it after the push: push again")
        if self.device.governor is not None:
            self._tuned = True  # before the attempt: it may succeed although its answer is lost
            tune = {"command": "tune", "workdir": self._workdir, "governor": self.device.governor}
            self._unmet = pick(self._ask(transport, tune, STEP_TIMEOUT_S), Tuned, self.device).unmet

    def _restore(self, transport: Transport) -> None:
        self._ask(transport, {"command": "restore", "workdir": self._workdir}, STEP_TIMEOUT_S)

    def _ask(self, transport: Transport, request: Mapping[str, object], timeout_s: float) -> list[Event]:
        return list(call_agent(transport, self.device, self._agent, request, timeout_s=timeout_s))

    def _copy(self, path: Path, sha256: str, name: str, on_progress: OnProgress | None = None) -> str:
        remote = f"{self._workdir}/{name}"
        self._link.call(
            lambda transport: copy_verified(transport, path, remote, sha256, on_progress=on_progress), patient=True
        )
        return remote


_MOMENTS = ("before", "after")


def _read_loop(samples: Samples) -> Span | None:
    if samples.start_ns is None or samples.end_ns is None:
        return None
    return Span(start_ns=samples.start_ns, end_ns=samples.end_ns)


def remove_left(transport: Transport, workdir: str) -> None:
    """Remove what sessions left that broke: old parts of copies, and outputs, which only the lease's holder makes."""
    remove_old_parts(transport, workdir)
    run_checked(transport, ["rm", "-rf", "--", f"{workdir}/outputs"])
