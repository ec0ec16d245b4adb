"""What each file of a build says after a prompt, in its own runtime on a device: kept in the run's folder."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from rankship_pipeline.flow.prompt import NEW_TOKENS
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Build
from rankship_targets.session.session import Session
from rankship_targets.trials.request import GenerateRequest

_FILE = "continuations.json"


@record
class Continuation:
    """The likeliest tokens of one file after a prompt; `first_ns` includes the prompt, `ns` are the others' times."""

    key: ArtifactKey
    tokens: tuple[int, ...]
    first_ns: int
    ns: tuple[int, ...]


@record
class Continuations:
    """What every file of a run that generates said after a prompt."""

    prompt: tuple[int, ...]
    said: tuple[Continuation, ...]


def continue_prompt(
    folder: Path,
    build: Build,
    remote: Mapping[str, str],
    prompt: tuple[int, ...],
    threads: int,
    session: Session,
    steps: Steps,
) -> None:
    """Let every pushed file that generates continue a prompt, once; `remote` has paths on the device by SHA-256."""
    known = read_continuations(folder)
    if known is not None and known.prompt == prompt:
        return
    said = []
    with TemporaryDirectory() as private:
        path = Path(private) / "prompt.npy"
        np.save(path, np.array([prompt], np.int64))
        tokens = session.push_file(path)
    for artifact in build.artifacts:
        if artifact.generation is None:
            continue
        with steps.step(f"continue the prompt with {artifact.key.title} on {session.device.name}"):
            request = GenerateRequest(
                key=artifact.key,
                artifact=remote[artifact.sha256],
                artifact_sha256=artifact.sha256,
                prompt=tokens,
                threads=threads,
                new_tokens=NEW_TOKENS,
                generation=artifact.generation,
            )
            made = session.generate(request)
        said.append(Continuation(key=artifact.key, tokens=made.tokens, first_ns=made.first_ns, ns=made.ns))
    write_atomic(folder / _FILE, encode(Continuations(prompt=prompt, said=tuple(said))).encode())


def read_continuations(folder: Path) -> Continuations | None:
    """Read what a run's files said; None if they were not asked."""
    with suppress(FileNotFoundError):
        return decode(Continuations, (folder / _FILE).read_bytes(), where=str(folder / _FILE))
    return None
