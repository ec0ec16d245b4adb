"""A working session on one device: connected, held by a lease, with the agent in place."""

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.errors import AgentDied, Lacks, PersistentTargetError, TargetError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.records import Verified
from rankship_targets.client.agent_file import find_agent
from rankship_targets.client.calls import call_agent, pick, split_turns
from rankship_targets.client.connect import open_transport
from rankship_targets.client.detached import DetachedRuns, Ticket, make_ticket
from rankship_targets.client.etdump import read_etdump
from rankship_targets.devices.device import Device
from rankship_targets.devices.meter_choice import MeterChoice
from rankship_targets.kit.benchmark_model import run_benchmark
from rankship_targets.meters.meter import Meter, Reach, open_meter
from rankship_targets.session.agent_requests import (
    AgentRequest,
    ask_to_generate,
    ask_to_infer,
    ask_to_inspect,
    ask_to_measure,
    ask_to_profile,
    ask_to_sweep,
    limit_duration,
    read_trial,
)
from rankship_targets.session.governor import HeldGovernor
from rankship_targets.session.greeting import greet
from rankship_targets.session.pushed import PushedFiles
from rankship_targets.transport.copying import OnProgress
from rankship_targets.transport.lease import STALE_S, Lease, describe_owner
from rankship_targets.transport.link import Link
from rankship_targets.transport.protocol import STEP_TIMEOUT_S, Transport, hash_remote, run_checked
from rankship_targets.trials.aggregate import Aggregate, BenchmarkSummary
from rankship_targets.trials.events import (
    Delegates,
    Done,
    Event,
    Generated,
    Loaded,
    Opened,
    Probe,
    Profiled,
    Taken,
    Traced,
)
from rankship_targets.trials.request import GenerateRequest, InferWay, LoadReading, MeasureRequest
from rankship_targets.trials.trial import RuntimeReading, Trial

INFER_TIMEOUT_S = 600.0
_ONE_AT_A_TIME = InferWay()


def stay_silent(_: str) -> None:
    """Ignore messages about the device."""


@contextmanager
def open_session(
    device: Device,
    *,
    connect: Callable[[Device], Transport] = open_transport,
    lease_stale_s: int = STALE_S,
    on_news: Callable[[str], None] = stay_silent,
    signers: Collection[str] = (),
) -> Iterator["Session"]:
    """Connect, take the lease and copy the agent; `on_news` is called with a message about each long wait.

    `signers` are the public keys, besides this user's own, whose signed manifests are believed.

    At the end, and after an error, the device's settings are restored and the lease is released.
    """
    link = Link(device, connect, on_news)
    try:
        workdir, left_tuned = link.call(lambda transport: greet(transport, device))
        lease = Lease(device=device, folder=f"{workdir}/lease", owner=describe_owner(), stale_s=lease_stale_s)
        link.call(lease.take)
        try:
            files = PushedFiles(device, link, workdir, signers)
            session = Session(device, link, lease, files, on_news, connect, left_tuned=left_tuned)
            with session.restoring():
                yield session
        finally:
            lease.give_up()
            with suppress(TargetError):  # if the connection is gone, the lease goes stale by itself
                link.call(lease.release)
    finally:
        link.close()


class Session:
    """Everything that can be done with a device while its lease is held; made by `open_session`."""

    def __init__(
        self,
        device: Device,
        link: Link,
        lease: Lease,
        files: PushedFiles,
        on_news: Callable[[str], None],
        connect: Callable[[Device], Transport],
        *,
        left_tuned: bool,
    ) -> None:
        self.device = device
        self.agent_sha256 = hash_file(find_agent())
        self._connect = connect
        self._link = link
        self._lease = lease
        self._files = files
        self._workdir = workdir = files.workdir
        self._governor = HeldGovernor(device, workdir, self._ask, left_set=left_tuned)
        self._agent = self._files.copy(find_agent(), self.agent_sha256, f"agents/{self.agent_sha256}.pyz")
        self._link.call(self._files.remove_left)
        self._runs = DetachedRuns(device, link, self._agent, workdir, on_news)

    def restoring(self) -> AbstractContextManager[None]:
        """Restore the device's settings after the block; before it, those that a killed session left changed."""
        return self._governor.restoring(self._link)

    def probe(self) -> Probe:
        """Return the agent's description of the device."""
        request = {"command": "probe", "workdir": self._workdir}
        return pick(self._link.call(lambda link: self._ask(link, request), patient=True), Probe, self.device)

    def list_delegates(self, artifact_format: Format) -> tuple[Delegate, ...]:
        """Return the delegates that a format's runtime has on the device."""
        request = {"command": "delegates", "format": artifact_format}
        events = self._link.call(lambda link: self._ask(link, request, INFER_TIMEOUT_S), patient=True)
        return pick(events, Delegates, self.device).known

    def inspect(self, request: MeasureRequest) -> Taken:
        """Return what the delegate of a pushed artifact's key takes of it; Lacks if the runtime does not say."""
        self._files.refuse_unproven(request)
        asked = ask_to_inspect(request)
        events = self._link.call(lambda link: self._ask(link, asked, request.timeout_s), patient=True)
        return pick(events, Taken, self.device)

    def push(self, artifact: Path, verified: Verified, *, on_progress: OnProgress | None = None) -> str:
        """Copy a verified and signed artifact; returns its path on the device.

        BuildError if it is not the file that was verified, ManifestRefused if nobody trusted signed it.
        """
        return self._files.push_artifact(artifact, verified, on_progress)

    def push_file(self, path: Path, *, on_progress: OnProgress | None = None) -> str:
        """Copy any other file, named by its content; returns its path on the device."""
        return self._files.push_file(path, on_progress)

    def infer(
        self,
        artifact_format: Format,
        artifact: str,
        inputs: Sequence[str],
        into: Path,
        way: InferWay = _ONE_AT_A_TIME,
    ) -> tuple[list[Path], RuntimeReading]:
        """Run all samples on the device, and fetch one .npy file per output, samples on axis 0."""
        folder = f"{self._workdir}/outputs/{secrets.token_hex(8)}"
        request = ask_to_infer(artifact_format, artifact, inputs, f"{folder}/output", way)

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
        """Load an artifact in a fresh process without running it."""
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
        """Time a pushed artifact in a fresh process; BuildError if it was not pushed as verified.

        The measurement goes on while the connection is broken, and is found again. With a `ticket` its result stays on
        the device until `forget`, so that another process can find it if this one dies; a failed one is removed.
        """
        self._files.refuse_unproven(request)
        retries_before, run = self._link.retries, ticket or make_ticket()
        try:
            events = self._carry_out(run, ask_to_measure(request, self.device), [request])
        except BaseException as failure:
            if ticket is None or isinstance(failure, PersistentTargetError | AgentDied):
                with suppress(TargetError):
                    self._runs.forget(run.run)
            raise
        trial = self._read_trial(request, run, events, retries_before)
        if ticket is None:
            self._runs.forget(run.run)
        return trial

    def sweep(self, requests: Sequence[MeasureRequest]) -> list[Trial]:
        """Time several pushed artifacts one after the other in one fresh process; returns their trials in this order.

        The requests differ only in artifact and inputs. Memory is not recorded: the artifacts share a process.
        """
        for request in requests:
            self._files.refuse_unproven(request)
        retries_before, run = self._link.retries, make_ticket()
        try:
            events = self._carry_out(run, ask_to_sweep(requests, self.device), requests)
            turns = split_turns(events, len(requests), self.device)
            trials = [
                self._read_trial(one, run, turn, retries_before) for one, turn in zip(requests, turns, strict=True)
            ]
        finally:
            with suppress(TargetError):  # a week later the device removes it by itself
                self._runs.forget(run.run)
        return [replace(one, peak_rss_bytes=None, runtime_rss_bytes=None) for one in trials]

    def generate(self, request: GenerateRequest) -> Generated:
        """Continue a prompt with a pushed artifact, the likeliest token each time; its times are of this one text."""
        self._files.refuse_unproven(request)
        asked = ask_to_generate(request)
        events = self._link.call(
            lambda link: self._ask(link, asked, INFER_TIMEOUT_S), retry_timeouts=False, patient=True
        )
        return pick(events, Generated, self.device)

    def open_meter(self, choice: MeterChoice, limit_ms: int) -> Meter:
        """Return a meter that records while this session measures, for at most `limit_ms`."""
        return open_meter(choice, Reach(self.device, self._agent, self._connect, limit_ms))

    def profile(self, request: MeasureRequest, runs: int) -> Profiled:
        """Profile `runs` inferences of a pushed artifact by the runtime's own profiler; its times are not latencies."""
        self._files.refuse_unproven(request)
        asked = ask_to_profile(request, runs)
        events = self._link.call(lambda link: self._ask(link, asked, request.timeout_s), retry_timeouts=False)
        if any(isinstance(one, Traced) for one in events):
            return read_etdump(pick(events, Traced, self.device).etdump, runs)
        return pick(events, Profiled, self.device)

    def benchmark(self, request: MeasureRequest) -> Aggregate:
        """Run the inventory's `benchmark_model` once on a pushed artifact; Lacks if it is not on the device."""
        self._files.refuse_unproven(request)
        binary, started = self.find_program(), make_ticket().started_utc

        def step(transport: Transport) -> BenchmarkSummary:
            self._lease.renew(transport)
            return run_benchmark(
                transport,
                self.device.benchmark_model or "",
                request.artifact,
                request.key.delegate,
                threads=request.threads,
                runs=request.min_samples,
                timeout_s=request.timeout_s,
            )

        return Aggregate(
            round=request.round,
            key=request.key,
            artifact_sha256=request.artifact_sha256,
            device=self.device.name,
            started_utc=started,
            threads=request.threads,
            summary=self._link.call(step, retry_timeouts=False),
            binary_sha256=binary,
        )

    def find_program(self) -> str:
        """Return the SHA-256 of the inventory's `benchmark_model`; Lacks if there is none."""
        path = self.device.benchmark_model
        found = None if path is None else self._link.call(lambda transport: hash_remote(transport, path))
        if found is None:
            message = f"{self.device.name} has no benchmark_model: {path or 'the inventory names none'}"
            hint = f"copy LiteRT's for its ABI there; in the inventory's [{self.device.name}]: benchmark_model = \"/…\""
            raise Lacks(message, hint=hint)
        return found

    def forget(self, ticket: Ticket) -> None:
        """End a measurement if it is still going on, and remove its files from the device."""
        self._runs.forget(ticket.run)

    def _carry_out(self, ticket: Ticket, asked: AgentRequest, requests: Sequence[MeasureRequest]) -> list[Event]:
        """Carry out a measurement as a detached run; before each start, lease, files and governor are checked."""

        def prepare(transport: Transport) -> None:
            self._lease.renew(transport)
            self._files.check_unchanged(transport, requests)
            self._governor.set(transport)

        return self._runs.carry_out(ticket.run, asked, limit_duration(requests[0], self.device), prepare)

    def _read_trial(
        self, request: MeasureRequest, ticket: Ticket, events: Sequence[Event], retries_before: int
    ) -> Trial:
        return read_trial(
            request,
            events,
            ticket,
            self.device,
            agent_sha256=self.agent_sha256,
            retries=self._link.retries - retries_before,
            unmet=self._governor.unmet,
        )

    def _ask(
        self, transport: Transport, request: Mapping[str, object], timeout_s: float = STEP_TIMEOUT_S
    ) -> list[Event]:
        return list(call_agent(transport, self.device, self._agent, request, timeout_s=timeout_s))
