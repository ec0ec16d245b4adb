"""How much of a file its delegate really took on a run's device."""

from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.delegates import find_facts
from rankship_pipeline.foundation.frozen import record


@record
class Delegated:
    """What a case's delegate took, as `source` says: operators in so many partitions; `left` by kind is all it did not.

    `operators` are the runtime's, after its own fusing; None where the file does not say how many are in a partition.
    """

    key: ArtifactKey
    partitions: int
    operators: int | None
    left: dict[str, int]
    source: str

    @property
    def took_nothing(self) -> bool:
        """Whether a delegate was to take operators away from the runtime, and took none."""
        return find_facts(self.key).takes and self.partitions == 0

    def __str__(self) -> str:
        """Return how much was taken as a phrase: "7 of 9 operators in 2 partitions; left: 1 CUMSUM, 1 TOPK"."""
        left = sum(self.left.values())
        count = "" if self.operators is None else f"{self.operators} of {self.operators + left} operators in "
        parts = f"{self.partitions} partition{'' if self.partitions == 1 else 's'}"
        kinds = ", ".join(
            f"{count} {kind}" for kind, count in sorted(self.left.items(), key=lambda one: (-one[1], one))
        )
        return f"{count}{parts}; left: {kinds}" if left else f"{count}{parts}"
