"""The runner interface that the parity gate needs, and a fake runner; the real ones are in rankship_targets."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rankship_pipeline.foundation.errors import CommandFailed
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.records import RunOutput

Array = NDArray[np.float32]


class Runner(Protocol):
    """Runs all samples through one artifact in its own runtime, one at a time, or `rows` at once."""

    def run(
        self,
        format: Format,  # noqa: A002
        artifact: Path,
        inputs: Sequence[Path],
        into: Path,
        rows: int = 1,
        generation: Generation | None = None,
    ) -> RunOutput:
        """Read .npy inputs (samples first), write one .npy per output into the folder; returns files and runtime.

        With `generation` the input is token ids (samples, n), and the output the logits (samples, n - P + 1,
        vocabulary) after the prompt of P tokens and after each further token.

        CommandFailed if the artifact cannot be loaded or run, Lacks if the runtime is missing.
        """


class FakeRunner:
    """Computes a function of arrays instead of the artifact, whose file only has to exist and not be empty.

    The function returns one array, or a tuple with one array per output.
    """

    def __init__(self, compute: Callable[..., Array | tuple[Array, ...]]) -> None:
        self._compute = compute

    def run(
        self,
        format: Format,  # noqa: A002
        artifact: Path,
        inputs: Sequence[Path],
        into: Path,
        rows: int = 1,
        generation: Generation | None = None,  # noqa: ARG002 - the function knows
    ) -> RunOutput:
        """Apply the function to `rows` samples at a time and stack the results."""
        if not artifact.is_file() or not artifact.read_bytes():
            raise CommandFailed(f"no {format} model in {artifact.name}", hint="build it again")
        arrays = [np.load(path, allow_pickle=False) for path in inputs]
        given = [self._compute(*(array[i : i + rows] for array in arrays)) for i in range(0, len(arrays[0]), rows)]
        samples = [one if isinstance(one, tuple) else (one,) for one in given]
        files = [into / f"output.{place}.npy" for place in range(len(samples[0]))]
        for file, outputs in zip(files, zip(*samples, strict=True), strict=True):
            np.save(file, np.concatenate(outputs))
        return RunOutput(outputs=tuple(map(str, files)), runtime="fake", runtime_version="1")
