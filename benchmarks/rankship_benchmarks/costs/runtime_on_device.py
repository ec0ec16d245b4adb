"""One runtime of a leased device, on which costs are measured and budgets landed, and what was pushed to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rankship_benchmarks.bundle.suite import GenerationChoice
from rankship_benchmarks.costs.probes import prove
from rankship_benchmarks.measure.cases import make_inputs
from rankship_pipeline.flow.artifacts import Bits, export_variants
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.stage_model import Model
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.artifact_key import DECODE, WHOLE, Variant
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import Lacks
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.records import Artifact, RankPlan
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ExportChoice, ParityChoice
from rankship_targets.devices.installing import show_kit_install
from rankship_targets.session.runner import HostRunner
from rankship_targets.session.session import Session
from rankship_targets.trials.request import MeasureRequest
from rankship_targets.trials.trial import Trial

# Fewest samples, least duration and longest warm-up of a trial, both in ms.
SINGLE_LAYER, WHOLE_MODEL = (20, 15, 20), (50, 100, 200)


@dataclass(frozen=True)
class Subject:
    """A verified artifact on the device, to be timed under a name; `site` is empty for a whole model."""

    site: str
    name: str
    artifact: Artifact
    remote: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """One format's runtime (name and version) on a device, and the number of threads it runs on.

    `part` is what is timed of a whole model, as a key's part: all of it, or a phase of one that generates, with a
    prompt of `prompt_tokens`.
    """

    session: Session
    format: Format
    runtime: str
    threads: int
    part: str = WHOLE
    prompt_tokens: int | None = None

    @property
    def device(self) -> str:
        """The device's name."""
        return self.session.device.name

    def time(self, subjects: Sequence[Subject], number: int, effort: tuple[int, int, int]) -> list[Trial]:
        """Time subjects one after the other in one fresh process.

        A phase reads every weight once, so that a layer finds those of all others in the caches: beside parts of a
        model that generates, as much memory is read as the rest of it has.
        """
        whole = max((one.artifact.size_bytes for one in subjects if one.artifact.generation), default=0)
        requests = [self.make_request(one, number, effort) for one in subjects]
        rests = [0 if one.artifact.generation else max(0, whole - one.artifact.size_bytes) for one in subjects]
        return self.session.sweep([replace(one, beside_bytes=rest) for one, rest in zip(requests, rests, strict=True)])

    def make_request(self, subject: Subject, number: int, effort: tuple[int, int, int]) -> MeasureRequest:
        """Make the request to time a subject."""
        min_samples, min_duration_ms, max_warmup_ms = effort
        if self.part not in {WHOLE, DECODE}:
            min_samples = GenerationChoice().min_prompts  # a prompt takes as long as hundreds of tokens
        return MeasureRequest(
            round=number,
            key=subject.artifact.key,
            artifact=subject.remote,
            artifact_sha256=subject.artifact.sha256,
            inputs=subject.inputs,
            threads=self.threads,
            min_samples=min_samples,
            min_duration_ms=min_duration_ms,
            max_warmup_ms=max_warmup_ms,
            generation=subject.artifact.generation,
        )

    def push(self, site: str, name: str, artifact: Artifact, store: Store, limits: ParityChoice) -> Subject:
        """Prove an artifact's parity on this host and copy it to the device with its inputs."""
        path, inputs, proof = prove(artifact, store, HostRunner(), limits)
        remote = self.session.push(path, proof)
        with TemporaryDirectory() as made:
            if artifact.generation is not None:
                artifact = self._choose_case(artifact, artifact.generation)
                inputs = make_inputs(artifact, store, GenerationChoice(), Path(made))
            return Subject(site, name, artifact, remote, tuple(self.session.push_file(one) for one in inputs))

    def _choose_case(self, artifact: Artifact, generation: Generation) -> Artifact:
        """Return a file that generates as its phase here."""
        prompt = self.prompt_tokens or generation.prompt_tokens
        key, generation = replace(artifact.key, part=self.part), replace(generation, prompt_tokens=prompt)
        return replace(artifact, key=key, generation=generation)

    def push_dense(self, prepared: Prepared, store: Store, steps: Steps) -> Subject:
        """Merge a recipe's models and push the dense result."""
        merged, _ = Stages(prepared, store, steps).merge(prepared.recipe.merge.method)
        return self.push_whole(prepared, store, steps, "dense", merged, None)

    def push_whole(
        self,
        prepared: Prepared,
        store: Store,
        steps: Steps,
        variant: Variant,
        model: Model,
        plan: RankPlan | None,
        bits: Bits | None = None,
    ) -> Subject:
        """Export a whole model to this format alone and push it; other formats follow once the ranks are known."""
        choice = ExportChoice(formats=(self.format,), context=prepared.recipe.export.context)
        one = replace(prepared, recipe=replace(prepared.recipe, export=choice))
        artifact, *_heads = export_variants(one, store, steps, [(variant, model, plan, bits)])
        return self.push("", variant, artifact, store, prepared.recipe.parity)


def choose_place(
    session: Session, format_: Format, threads: int, part: str = WHOLE, prompt_tokens: int | None = None
) -> Place:
    """Return the device's runtime for a format; Lacks if it has none."""
    runtime = session.probe().runtimes.get(format_)
    if runtime is None:
        name = session.device.name
        hint = f"{show_kit_install(name)}; or name another format"
        raise Lacks(f"{name} has no runtime for {format_}", hint=hint)
    return Place(session, format_, " ".join(runtime), threads, part, prompt_tokens)
