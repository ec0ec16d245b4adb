"""One exported file with its record and its proof: how it is written to the store, and read again."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.records import Artifact, RankPlan, Variant
from rankship_pipeline.foundation.store import Entry, Store
from rankship_pipeline.models.data import Inputs

_RECORD = "artifact.json"


@dataclass(frozen=True)
class Part:
    """What becomes one file per format: a module, the inputs of its proof, and the plan of its factored layers.

    `task` is whose head it is; `output` names what it gives.
    """

    variant: Variant
    module: nn.Module
    samples: Inputs
    plan: RankPlan | None = None
    task: str | None = None
    output: str = "logits"

    @property
    def title(self) -> str:
        """What progress and errors call it."""
        return self.variant if self.task is None else f"{self.variant} head of {self.task}"


def read_artifact(entry: Entry) -> Artifact:
    """The record of an exported file; its `file` is relative to the store."""
    return decode(Artifact, entry.read(_RECORD).read_bytes(), where=str(entry.folder))


def find_proof(artifact: Artifact, store: Store) -> tuple[Path, list[Path], list[Path]]:
    """The artifact's file, its parity inputs and torch's expected outputs; the arrays are known to be unchanged."""
    path = store.root / artifact.file
    entry = store.open(path.parent)
    inputs = [entry.read(f"input.{index}.npy") for index in range(len(artifact.inputs))]
    return path, inputs, [entry.read("expected.0.npy")]
