"""The normalisation that a model's inputs went through, and whether two are the same."""

from math import isclose

from rankship_pipeline.foundation.records import record


@record
class Normalisation:
    """What images went through before a model saw them: (pixel − mean) / std per channel, pixels in [0, 1].

    One value serves all channels.

    Keys:
        mean: one value, or one per channel
        std: one value, or one per channel
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def is_like(self, other: "Normalisation") -> bool:
        """Whether both do the same to every channel, rounding aside."""
        channels = max(len(self.mean), len(other.mean))
        pairs = ((self.mean, other.mean), (self.std, other.std))
        return all(
            isclose(mine[index % len(mine)], theirs[index % len(theirs)], rel_tol=1e-9, abs_tol=1e-12)
            for mine, theirs in pairs
            for index in range(channels)
        )
