"""The Pareto front: points that no other point beats."""

from collections.abc import Sequence


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the positions of the points (cost, gain) that none beats, by rising cost.

    A point beats another if it costs at most as much, gains at least as much, and is better in one of the two. Of equal
    points the first is kept.
    """
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1], place)):
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front
