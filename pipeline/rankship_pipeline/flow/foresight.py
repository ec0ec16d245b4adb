"""Says before a build how long it will take and how much memory, and refuses one that this machine cannot hold."""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import psutil

from rankship_pipeline.flow.cached_stage import Form, Kept, Unmade, find_stage
from rankship_pipeline.flow.estimate import StageEstimate, Work, estimate
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.spare import find_free_bytes
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.units import show_bytes, show_percent, show_seconds
from rankship_pipeline.models.layers import count_parameters
from rankship_pipeline.recipe.choices import choose
from rankship_pipeline.recover.batchnorm import has_statistics

T = TypeVar("T")

# A build is refused where even this part of its estimate is more than is free.
_CERTAIN = 2 / 3
_TOLD = 0.15  # a layer's share of a stage, from which it is named
_FEWEST = 8  # calibration samples that a hint asks for at least
_MOST = 4  # layers that a hint asks to keep dense at most


def foresee(budgeted: Budgeted, store: Store, steps: Steps) -> None:
    """Say what the stages that are not in the store will take; InputError where memory will not do."""
    work = describe_work(budgeted.prepared)
    finished = find_finished(budgeted, store)
    stages = [one for one in estimate(work) if one.name not in finished]
    profile.note_estimates({one.name: (one.seconds, one.peak_bytes) for one in stages})
    steps.note(say_first(stages, [one.name for one in work.recipe.models if one.train is not None]))
    free = find_free_bytes()
    needed = max(one.peak_bytes for one in stages) - work.resident_bytes
    if needed * _CERTAIN > free:
        refuse(work, finished, needed, free)
    if needed > free:
        steps.note(f"that is {show_bytes(needed)} more than now, of {show_bytes(free)} free: it may not fit")


def describe_work(prepared: Prepared) -> Work:
    """What a prepared recipe's build is made of."""
    data = prepared.data
    assert prepared.pace is not None  # noqa: S101 - a recipe that passed its checks has one
    return Work(
        recipe=prepared.recipe,
        pace=prepared.pace,
        layers=prepared.layers,
        calibration={name: len(inputs[0]) for name, inputs in data.calibration.items()},
        tests=len(data.test_inputs[0]),
        parameters=count_parameters(prepared.model),
        has_norms=has_statistics(prepared.model),
        resident_bytes=psutil.Process().memory_info().rss,
    )


def say_first(stages: Collection[StageEstimate], trained: Collection[str]) -> str:
    """One sentence on the time and memory of a build, and on what dominates both."""
    seconds = sum(one.seconds for one in stages)
    slowest, largest = max(stages, key=lambda one: one.seconds), max(stages, key=lambda one: one.peak_bytes)
    told = [
        f"about {show_seconds(seconds)} and {show_bytes(largest.peak_bytes)} of memory to build",
        f"most time: {slowest.name}, {show_seconds(slowest.seconds)}"
        + _name_layer(slowest.layer_seconds, slowest.seconds),
        f"most memory: {largest.name}" + _name_layer(largest.layer_bytes, largest.peak_bytes),
    ]
    training = [one for one in stages if one.name in {f"train {name}" for name in trained}]
    told += [f"without the time to {' and '.join(one.name for one in training)}"] if training else []
    return "; ".join(told)


def _name_layer(parts: Mapping[str, float], whole: float) -> str:
    """The costliest layer of a stage and its share of the `whole` stage; empty where no layer is much of it."""
    name = max(parts, key=lambda one: parts[one], default="")
    share = parts[name] / whole if name else 0.0
    return f" ({show_percent(share, 0)} of it for {name})" if share >= _TOLD else ""


def find_finished(budgeted: Budgeted, store: Store) -> frozenset[str]:
    """The titles of the stages whose results are in the store; nothing is computed."""
    found = set[str]()

    def keep(
        store: Store,
        kind: str,
        made_from: Mapping[str, object],
        form: Form[T],
        compute: Callable[[], T],
        *,
        steps: Steps | None = None,
        title: str = "",
    ) -> Kept[T]:
        kept = find_stage(store, kind, made_from, form, compute, steps=steps, title=title)
        found.add(title)
        return kept

    recipe = budgeted.prepared.recipe
    stages = Stages(budgeted.prepared, store, Steps(quiet=True), keep=keep)
    for source in recipe.models:
        with suppress(Unmade):
            stages.calibrate(stages.load_source(source.name), source.name)
    with suppress(Unmade):
        stages.weigh_outputs(stages.merge(recipe.merge.method)[0])
    for way in (choose(recipe), *recipe.compare):
        with suppress(Unmade):
            stages.compress(budgeted, way)
    return frozenset(found)


def refuse(work: Work, finished: Collection[str], needed: int, free: int) -> None:
    """Raise InputError that names the stage and layer that need most, and the settings that would make it fit."""
    largest = _find_largest(work, finished)
    helps = [said for said, other in _list_changes(work) if _need(other, finished) * _CERTAIN <= free]
    wanted = show_bytes(work.resident_bytes + needed)
    raise InputError(
        f"the build needs about {show_bytes(needed)} of memory and {show_bytes(free)} are free: most for"
        f" {largest.name}{_name_layer(largest.layer_bytes, needed)}",
        hint=f"{'; or '.join(helps)}" if helps else f"build it on a machine with {wanted} of memory",
    )


def _need(work: Work, finished: Collection[str]) -> int:
    return _find_largest(work, finished).peak_bytes - work.resident_bytes


def _find_largest(work: Work, finished: Collection[str]) -> StageEstimate:
    return max((one for one in estimate(work) if one.name not in finished), key=lambda one: one.peak_bytes)


def _list_changes(work: Work) -> list[tuple[str, Work]]:
    """What a recipe may change to need less memory, in words, and the work that is left then."""
    recipe = work.recipe
    changes = []
    if recipe.factorise.curvature:
        plain = replace(recipe, factorise=replace(recipe.factorise, curvature=False))
        changes.append(("set curvature = false in [factorise]", replace(work, recipe=plain)))
    largest = max(estimate(work), key=lambda one: one.peak_bytes).layer_bytes
    widest = sorted(largest, key=lambda name: -largest[name])
    for count in range(1, min(_MOST, len(work.layers) - 1) + 1):
        dense = widest[:count]
        left = tuple(one for one in work.layers if not any(use.name in dense for use in one.uses))
        patterns = ", ".join(f'"{name}"' for name in dense)
        changes.append((f"keep the widest layers dense: exclude = [{patterns}] in [ranks]", replace(work, layers=left)))
    fewer = {name: max(_FEWEST, count // 8) for name, count in work.calibration.items()}
    if sum(fewer.values()) < work.samples:
        changes.append((f"give {sum(fewer.values())} calibration samples", replace(work, calibration=fewer)))
    if len(recipe.export.formats) > 1:
        first = recipe.export.formats[:1]
        one = replace(recipe, export=replace(recipe.export, formats=first))
        changes.append((f'export only "{first[0]}": formats in [export]', replace(work, recipe=one)))
    return changes
