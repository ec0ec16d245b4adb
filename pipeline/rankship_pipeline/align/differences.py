"""Every way in which models to merge differ, in one list, each with what can be done about it.

Only headers and configuration files are read (facts.py). What is harmless is named, what can be mended is mended
knowingly (mend.py), all else is refused before any data is loaded or model trained.
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from rankship_pipeline.align.advice import PREPARATION, SETTINGS, TENSORS
from rankship_pipeline.align.facts import Facts, gather_facts, leave_out_head
from rankship_pipeline.align.make_alike import Mend
from rankship_pipeline.foundation.errors import MergeMismatch
from rankship_pipeline.models.opened import OpenedSource
from rankship_pipeline.models.weights import list_differences
from rankship_pipeline.recipe.choices import Recipe, Source, choose, list_sources
from rankship_pipeline.recipe.merge_methods import METHODS
from rankship_pipeline.recipe.normalisation import Normalisation

_FLOATS = {"F64", "F32", "F16", "BF16"}
_INTEGERS = {"I64", "I32", "I16", "I8", "U8", "BOOL"}
_SHOWN = 24  # lines of one rule about one pair of models
_SHOWN_NAMES = 6


@dataclass(frozen=True)
class Finding:
    """One difference in words; `remedy` says what can be done. `refused`: no merge before somebody does it."""

    text: str
    remedy: str
    refused: bool = True


# The first model, another, and what the loader's images went through.
Rule = Callable[[Facts, Facts, Normalisation | None], Iterator[Finding]]


def check_mergeable(recipe: Recipe, sources: Mapping[str, OpenedSource]) -> tuple[dict[str, Mend], tuple[str, ...]]:
    """How each model is mended before merging, and all that is named without being refused.

    Raises MergeMismatch with every difference of every model against the first.
    """
    facts = [gather_facts(sources[source.name]) for source in _list_compared(recipe)]
    if recipe.merge.head is not None:
        facts = [leave_out_head(one, recipe.merge.head) for one in facts]
    reference = facts[0]
    notes = refuse_unlike(facts, recipe.data.normalise)
    stated = next((one.normalise for one in facts if one.normalise is not None), None)
    if recipe.data.normalise is None and stated is not None:
        notes.append(
            f"the loader's images are taken to be normalised by mean {list(stated.mean)}, std {list(stated.std)}:"
            " state [data] normalise where they are not"
        )
    mends = {one.name: Mend(label_order=_order_labels(reference, one)) for one in facts}
    for one in facts:
        given, wanted = one.normalise, recipe.data.normalise
        if given is not None and wanted is not None and not given.is_like(wanted):
            mends[one.name] = replace(mends[one.name], trained=given, given=wanted)
            notes.append(f"{one.name}: its own input normalisation is folded into its first layer")
    return mends, tuple(notes)


def refuse_unlike(facts: Sequence[Facts], given: Normalisation | None = None) -> list[str]:
    """All that is named without being refused; MergeMismatch with every difference of every model against the first.

    `given` is what the loader's images went through, None where nobody says.
    """
    reference, others = facts[0], facts[1:]
    refused: list[str] = []
    notes: list[str] = []
    for other in others:
        where = f"{other.name} against {reference.name}"
        for rule in RULES.values():
            findings = list(rule(reference, other, given))
            refused += _write([one for one in findings if one.refused], where)
            notes += [f"{where}: {one.text}: {one.remedy}" for one in findings if not one.refused]
    if refused:
        raise MergeMismatch(
            "the models cannot be merged:\n" + "\n".join(refused),
            hint="mend what is listed, or leave a model out; nothing was trained or built yet",
        )
    return notes


def _list_compared(recipe: Recipe) -> tuple[Source, ...]:
    """The models, and their base where a merge of the recipe reads it."""
    needed = any(METHODS[way.merge].base for way in (choose(recipe), *recipe.compare))
    return list_sources(recipe) if needed else recipe.models


def _write(findings: Sequence[Finding], where: str) -> list[str]:
    """A line per finding, and under those of one remedy what can be done."""
    lines = []
    for remedy, group in groupby(findings, key=lambda one: one.remedy):
        texts = [one.text for one in group]
        lines += [f"  {where}: {text}" for text in texts[:_SHOWN]]
        if len(texts) > _SHOWN:
            lines.append(f"  {where}: and {len(texts) - _SHOWN} more of this kind")
        lines.append(f"    → {remedy}")
    return lines


def compare_tensors(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Names missing or extra, and shapes."""
    shapes = [{name: header.shape for name, header in one.tensors.items()} for one in (reference, other)]
    for line in list_differences(shapes[0], shapes[1]):
        ending = line.rpartition(": ")[2]
        remedy = TENSORS.get(ending, TENSORS["shape"])
        yield Finding(line, remedy.format(reference=reference.name, other=other.name))


def compare_types(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Stored types: floating-point ones are cast to float32 whatever they are, packed ones cannot be averaged."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in sorted(reference.tensors.keys() & other.tensors.keys()):
        pair = (other.tensors[name].dtype, reference.tensors[name].dtype)
        if pair[0] != pair[1]:
            kinds.setdefault(pair, []).append(name)
    for (found, wanted), names in kinds.items():
        text = f"{_list(names)}: stored as {found} instead of {wanted}"
        if {found, wanted} <= _FLOATS:
            yield Finding(text, "cast to float32", refused=False)
        elif {found, wanted} <= _INTEGERS:
            yield Finding(text, "counters come from the first model", refused=False)
        else:
            yield Finding(text, f"save {other.name} dequantised, in a floating-point type")


def compare_settings(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Configuration: with equal weights another epsilon, rotation or activation is another function."""
    if not reference.settings or not other.settings:
        return
    keys = sorted(reference.settings.keys() | other.settings.keys())
    for pattern, (remedy, refused) in SETTINGS.items():
        matching = [key for key in keys if fnmatch.fnmatchcase(key, pattern)]
        keys = [key for key in keys if key not in matching]
        for key in matching:
            found, wanted = other.settings.get(key), reference.settings.get(key)
            if found != wanted:
                yield Finding(f"{key} is {found!r} instead of {wanted!r}", remedy, refused=refused)


def compare_labels(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Class names: another order is mended, other names are another task."""
    wanted, found = reference.labels, other.labels
    if wanted == found:
        return
    if not wanted or not found:
        unnamed, named = (other, reference) if wanted else (reference, other)
        yield Finding(
            f"{unnamed.name} names no classes",
            f"taken to be in the order of {named.name}'s; else state `labels`",
            refused=False,
        )
    elif sorted(wanted) == sorted(found):
        yield Finding(
            f"classes are ordered {_list(found)}", f"its head's rows are put in {reference.name}'s order", refused=False
        )
    else:
        ours, theirs = (_list(sorted(set(one) - set(two))) or "none" for one, two in ((wanted, found), (found, wanted)))
        yield Finding(
            f"classes: only in {reference.name}: {ours}; only in {other.name}: {theirs}",
            "where two names mean one class, state `labels` in [[models]]; else train both on one list of classes",
        )


def compare_vocabularies(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Tokens: row i of an embedding must mean the same token in every model."""
    wanted, found = reference.tokens, other.tokens
    if wanted == found:
        return
    if not wanted or not found:
        empty = other if wanted else reference
        text = f"{empty.name} comes without tokenizer files"
        yield Finding(text, "its vocabulary is taken to be the other's", refused=False)
        return
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    moved = [token for token in wanted.keys() & found.keys() if wanted[token] != found[token]]
    if missing or extra:
        yield Finding(
            f"vocabulary of {len(found)} tokens instead of {len(wanted)}: lacks {_list(missing) or 'none'}; has besides"
            f" {_list(extra) or 'none'}",
            "train both with one tokenizer: add the tokens to the smaller one and resize its embedding",
        )
    if moved:
        yield Finding(
            f"{len(moved)} tokens have another number, among them {_list(sorted(moved))}",
            f"put the rows of {other.name}'s embedding in {reference.name}'s order and save both with one tokenizer",
        )


def compare_preparation(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """What text or images go through before the model: the loader can do it in one way only."""
    for key, (remedy, refused) in PREPARATION.items():
        if key not in reference.preparation or key not in other.preparation:
            continue
        found, wanted = other.preparation[key], reference.preparation[key]
        if found != wanted:
            yield Finding(f"{key} is {found!r} instead of {wanted!r}", remedy, refused=refused)


def compare_normalisations(reference: Facts, other: Facts, given: Normalisation | None) -> Iterator[Finding]:
    """Means and deviations: folded to the loader's where that is stated, never ignored."""
    wanted, found = reference.normalise, other.normalise
    if given is None and wanted is not None and found is not None and not found.is_like(wanted):
        yield Finding(
            f"input normalisation is mean {list(found.mean)}, std {list(found.std)} instead of mean"
            f" {list(wanted.mean)}, std {list(wanted.std)}",
            "state what the loader's images went through ([data] normalise): the others are folded into first layers",
        )


def compare_files(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """The same file twice is no mistake of ours to refuse, and likely one of the recipe's."""
    if reference.files and reference.files == other.files:
        yield Finding("both are the same file", "merging them changes nothing", refused=False)


RULES: dict[str, Rule] = {
    "tensors": compare_tensors,
    "types": compare_types,
    "settings": compare_settings,
    "labels": compare_labels,
    "vocabularies": compare_vocabularies,
    "preparation": compare_preparation,
    "normalisations": compare_normalisations,
    "files": compare_files,
}


def _order_labels(reference: Facts, other: Facts) -> tuple[int, ...]:
    """Where each of the reference's classes stands in the other's head; empty where nothing has to move."""
    if not other.labels or not reference.labels or other.labels == reference.labels:
        return ()
    return tuple(other.labels.index(label) for label in reference.labels)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) if " " in name else name for name in names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")
