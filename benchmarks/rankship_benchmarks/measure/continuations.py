"""What each file of a build says after a prompt, in its own runtime on a device, the likeliest token each time."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from rankship_benchmarks.measure.host_gate import verify_on_host
from rankship_pipeline.flow.prompt import NEW_TOKENS, Prompt
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Build
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.devices.device import Device
from rankship_targets.devices.quarantine import watching
from rankship_targets.session.session import open_session
from rankship_targets.trials.request import GenerateRequest


@record
class Continuation:
    """The tokens that one file said on one device; `first_ns` includes the prompt, `ns` are the other tokens' times."""

    key: ArtifactKey
    device: str
    tokens: tuple[int, ...]
    first_ns: int
    ns: tuple[int, ...]


def continue_prompt(
    build: Build, prompt: Prompt, device: Device, store: Store, limits: ParityChoice, threads: int, steps: Steps
) -> tuple[Continuation, ...]:
    """Push the files that are not there yet, and let each that generates continue the prompt."""
    verified = {one.artifact_sha256: one for one in verify_on_host(build, store, limits, steps)}
    found = []
    with TemporaryDirectory() as folder, watching(device), open_session(device, on_news=steps.note) as session:
        path = Path(folder) / "prompt.npy"
        np.save(path, np.array([prompt.tokens], np.int64))
        tokens = session.push_file(path)
        for artifact in build.artifacts:
            if artifact.generation is None:
                continue
            with steps.step(f"continue the prompt with {artifact.key.title} on {device.name}"):
                request = GenerateRequest(
                    key=artifact.key,
                    artifact=session.push(store.root / artifact.file, verified[artifact.sha256]),
                    artifact_sha256=artifact.sha256,
                    prompt=tokens,
                    threads=threads,
                    new_tokens=NEW_TOKENS,
                    generation=prompt.generation,
                )
                made = session.generate(request)
            found.append(
                Continuation(
                    key=artifact.key, device=device.name, tokens=made.tokens, first_ns=made.first_ns, ns=made.ns
                )
            )
    return tuple(found)
