"""The normalisation of a model's inputs, and whether two are the same."""

from math import isclose

from rankship_pipeline.foundation.frozen import record


@record
class Normalisation:
    """The normalisation of a model's input images: (pixel − mean) / std per channel, pixels in [0, 1].

    A single value applies to all channels.

    Keys:
        mean: one value, or one per channel
        std: one value, or one per channel
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def is_like(self, other: "Normalisation") -> bool:
        """Whether both are equal on every channel, up to rounding."""
        channels = max(len(self.mean), len(other.mean))
        pairs = ((self.mean, other.mean), (self.std, other.std))
        return all(
            isclose(mine[index % len(mine)], theirs[index % len(theirs)], rel_tol=1e-9, abs_tol=1e-12)
            for mine, theirs in pairs
            for index in range(channels)
        )
