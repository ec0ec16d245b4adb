"""Finds the night that made a case slower or faster: stored files of the nights between two are measured again.

Every file is compared with the first night's own, so that many small changes cannot hide behind one another: at all
times the lower end is known to be the same as the first night, and the upper end to differ.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from rankship_benchmarks.bundle.bundle import Header, open_bundle
from rankship_benchmarks.judge.compare import Outcome
from rankship_benchmarks.nightly.pair import is_file_of
from rankship_benchmarks.nightly.records import NightRecord
from rankship_benchmarks.stats.estimates import Estimate
from rankship_pipeline.export.artifact import find_proof
from rankship_pipeline.export.parity import refuse_changed
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.errors import BuildError, InputError
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Artifact
from rankship_pipeline.foundation.store import Store

End = Literal["found", "same file", "no step", "unsure"]


@record
class Kept:
    """One night's file of a case, how many threads it ran with, and why it cannot be measured any more (empty: it can).

    `run` is the folder of the night's bundle.
    """

    night: int
    run: str
    sha256: str
    header: Header
    threads: int = 1
    gone: str = ""


@record
class Look:
    """One comparison: the later night against the first one, and its verdict."""

    night: int
    verdict: Outcome
    reason: str
    ratio: Estimate | None


@record
class Bisection:
    """Where a step lies: after the night `low`, at the latest in the night `high`.

    `end` is "found"; "same file" where both nights have one file; "no step" where the two files take the same time
    today; "unsure" where a comparison could not be decided. `between` are nights between `low` and `high` whose files
    are gone. `looks` are all comparisons in order.
    """

    end: End
    low: int
    high: int
    looks: tuple[Look, ...]
    between: tuple[int, ...] = ()


def list_kept(
    results: Path, nights: Sequence[NightRecord], span: tuple[int, int], device: str, key: ArtifactKey, store: Store
) -> list[Kept]:
    """List one case's file in each night of a span on a device, in order, gone or not; gaps are left out.

    InputError if one of the span's own nights did not measure the case.
    """
    ends = {night.number: night.recipe for night in nights if night.number in span}
    if len(set(ends.values())) > 1:
        recipes = " and ".join(ends[number] for number in span)
        message = f"nights {span[0]} and {span[1]} measured different recipes, {recipes}"
        raise InputError(message, hint="name two nights of one suite")
    found = [
        kept
        for night in nights
        if span[0] <= night.number <= span[1] and night.recipe in ends.values()
        for kept in _find_kept(results, night, device, key, store)
    ]
    missing = sorted(set(span) - {one.night for one in found})
    if missing:
        message = f"night {missing[0]} has no run of {key.heading} on {device} that can be read"
        raise InputError(message, hint="the page of all nights shows which nights measured it")
    return found


def bisect_files(kept: Sequence[Kept], compare: Callable[[Kept, Kept], Look]) -> Bisection:
    """Find the first file whose time differs from the first night's; `compare` measures a file against that one.

    InputError if the file of the first or last night is gone.
    """
    for one in (kept[0], kept[-1]):
        if one.gone:
            raise InputError(f"night {one.night}: {one.gone}", hint="only nights whose files are kept can be measured")
    first, looks = kept[0], list[Look]()
    if first.sha256 == kept[-1].sha256:
        return Bisection(end="same file", low=first.night, high=kept[-1].night, looks=())
    there = _keep_distinct(kept)

    def look(place: int) -> Outcome:
        looks.append(compare(first, there[place]))
        return looks[-1].verdict

    def tell(end: End, low: int, high: int) -> Bisection:
        early, late = _find_last(kept, there[low].sha256, there[high].night), there[high].night
        between = tuple(one.night for one in kept if one.gone and early < one.night < late)
        return Bisection(end=end, low=early, high=late, looks=tuple(looks), between=between)

    low, high = 0, len(there) - 1
    word = look(high)
    if word in {"same", "unknown"}:
        return tell("no step" if word == "same" else "unsure", low, high)
    while high - low > 1:
        middle = (low + high) // 2
        if middle and there[middle].sha256 == first.sha256:  # made again after a change that was taken back
            low = middle
            continue
        told = look(middle)
        if told == "unknown":
            return tell("unsure", low, high)
        low, high = (low, middle) if told == word else (middle, high)
    return tell("found", low, high)


def _find_kept(results: Path, night: NightRecord, device: str, key: ArtifactKey, store: Store) -> Iterator[Kept]:
    for one in night.devices:
        if one.measured_on != device or not one.run:
            continue
        with suppress(InputError):  # the run's folder is gone or damaged: like a gap
            bundle = open_bundle(results / one.run)
            threads = next((trial.threads for trial in bundle.trials), 1)
            for artifact in bundle.header.build.artifacts:
                if is_file_of(artifact, key):
                    yield Kept(
                        night=night.number,
                        run=one.run,
                        sha256=artifact.sha256,
                        header=bundle.header,
                        threads=threads,
                        gone=find_loss(artifact, store),
                    )


def find_loss(artifact: Artifact, store: Store) -> str:
    """Return why a file or its inputs cannot be measured any more; empty if they can."""
    try:
        refuse_changed(artifact, store.root / artifact.file)
        find_proof(artifact, store)
    except BuildError as failure:
        return str(failure)
    return ""


def _keep_distinct(kept: Sequence[Kept]) -> list[Kept]:
    """Keep the nights whose files are there and differ from the file there before."""
    there: list[Kept] = []
    for one in kept:
        if not one.gone and (not there or there[-1].sha256 != one.sha256):
            there.append(one)
    return there


def _find_last(kept: Sequence[Kept], sha256: str, before: int) -> int:
    """Find the last night before another that had this file."""
    return max(one.night for one in kept if one.sha256 == sha256 and one.night < before)
