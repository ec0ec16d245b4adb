"""Knows that tensors which a model ties are one: a checkpoint may store it under one name, another, or both."""

from collections.abc import Iterator, Mapping

import torch

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.skeleton import Skeleton
from rankship_pipeline.models.tensor_pieces import Readable, count_rows

_ROWS = 1024  # compared at once


def fit_ties(
    found: Mapping[str, Readable], first: Mapping[str, Readable], skeletons: tuple[Skeleton, Skeleton], *, where: str
) -> dict[str, Readable]:
    """The tensors of one model under the names of the first, where only tied copies set their names apart.

    A copy that the first lacks is left out, one that it has is added. `skeletons` are those of both models. InputError
    where a copy differs from what it is tied to, so that leaving it out would lose it.
    """
    fitted = dict(found)
    for name in first.keys() - found.keys():
        for twin in _list_twins(name, found, skeletons):
            _refuse_differing(first, name, twin, where)
            fitted[name] = found[twin]
    for name in found.keys() - first.keys():
        for twin in _list_twins(name, first, skeletons):
            _refuse_differing(found, name, twin, where)
            fitted.pop(name, None)
    return fitted


def list_copies(tensors: Mapping[str, Readable], skeleton: Skeleton) -> set[str]:
    """The names under which a model's tied tensors are stored again, with the same values, after their first module."""
    copies: set[str] = set()
    for name, twins in skeleton.twins.items():
        first, *others = (skeleton.find_name(one, tensors) for one in (name, *twins))
        if first in tensors and first not in copies:
            copies |= {one for one in others if one in tensors and _is_equal(tensors[first], tensors[one])}
    return copies


def _list_twins(name: str, known: Mapping[str, Readable], skeletons: tuple[Skeleton, Skeleton]) -> Iterator[str]:
    """The known names of the tensors that both models tie to one."""
    ties = [{one.find_name(key, {*known, name}): twins for key, twins in one.twins.items()} for one in skeletons]
    for twin in ties[0].get(name, ()):
        if twin in ties[1].get(name, ()) and (held := skeletons[0].find_name(twin, known)) in known:
            yield held


def _refuse_differing(tensors: Mapping[str, Readable], name: str, twin: str, where: str) -> None:
    """InputError if a model stores both names with different values."""
    if not {name, twin} <= tensors.keys() or _is_equal(tensors[name], tensors[twin]):
        return
    raise InputError(
        f"{where}: the models tie {name} to {twin}, but one of them stores {name} with other values",
        hint="write tie_word_embeddings = false into all their config.json and store both tensors in each, or delete"
        f" {name} from the file if it is stale",
    )


def _is_equal(one: Readable, other: Readable) -> bool:
    if one.shape != other.shape:
        return False
    starts = range(0, count_rows(one), _ROWS)
    stops = [min(start + _ROWS, count_rows(one)) for start in starts]
    pairs = zip(starts, stops, strict=True)
    return all(torch.equal(one.read(start, stop), other.read(start, stop)) for start, stop in pairs)
