"""Lists every way in which models to merge differ, each with its remedy.

Only headers and configuration files are read (facts.py). Harmless differences are reported, those that can be removed
exactly are removed (make_alike.py), all others are refused before data are loaded or models trained.
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from rankship_pipeline.align.advice import PREPARATION, SETTINGS, TENSORS
from rankship_pipeline.align.facts import Facts, gather_facts, leave_out_copies, leave_out_head
from rankship_pipeline.align.make_alike import Mend
from rankship_pipeline.align.padding import find_padding
from rankship_pipeline.foundation.errors import MergeMismatch
from rankship_pipeline.models.constants import is_constant
from rankship_pipeline.models.fit_names import match_names
from rankship_pipeline.models.opened import OpenedSource
from rankship_pipeline.models.weights import list_differences
from rankship_pipeline.recipe.choices import Recipe, Source, choose, list_sources
from rankship_pipeline.recipe.merge_methods import METHODS
from rankship_pipeline.recipe.normalisation import Normalisation

_FLOATS = {"F64", "F32", "F16", "BF16"}
_INTEGERS = {"I64", "I32", "I16", "I8", "U8", "BOOL"}
_SHOWN = 24  # lines shown for one rule and one pair of models
_SHOWN_NAMES = 6


@dataclass(frozen=True)
class Finding:
    """One difference in words, and its `remedy`; a `refused` one must be removed before merging."""

    text: str
    remedy: str
    refused: bool = True


# The first model, another one, and the normalisation of the loader's images.
Rule = Callable[[Facts, Facts, Normalisation | None], Iterator[Finding]]


def check_mergeable(recipe: Recipe, sources: Mapping[str, OpenedSource]) -> tuple[dict[str, Mend], tuple[str, ...]]:
    """How each model is made like the first before merging, and the notes on differences that are not refused.

    Raises MergeMismatch listing every refused difference of every model from the first.
    """
    facts = [gather_facts(sources[source.name]) for source in _list_compared(recipe)]
    facts = [rename_tensors(one, facts[0]) for one in facts]
    if any(one.tensors.keys() != facts[0].tensors.keys() for one in facts):
        facts = [leave_out_copies(one, sources[one.name]) for one in facts]
    if recipe.merge.head is not None:
        facts = [leave_out_head(one, recipe.merge.head) for one in facts]
    reference = facts[0]
    notes = refuse_unlike(facts, recipe.data.normalise)
    notes += [doubt for source in recipe.models if (doubt := sources[source.name].doubt_base()) is not None]
    stated = next((one.normalise for one in facts if one.normalise is not None), None)
    if recipe.data.normalise is None and stated is not None:
        notes.append(
            f"the loader's images are assumed to be normalised by mean {list(stated.mean)}, std {list(stated.std)}:"
            " if they are not, write [data] normalise"
        )
    mends = {
        one.name: Mend(label_order=_order_labels(reference, one), padded=bool(find_padding(reference, one)))
        for one in facts
    }
    for one in facts:
        given, wanted = one.normalise, recipe.data.normalise
        if given is not None and wanted is not None and not given.is_like(wanted):
            mends[one.name] = replace(mends[one.name], trained=given, given=wanted)
            notes.append(f"{one.name}: its own input normalisation is folded into its first layer")
    return mends, tuple(notes)


def rename_tensors(other: Facts, reference: Facts) -> Facts:
    """The facts with the reference's names of tensors, where only a wrapper's prefix sets them apart."""
    fit = match_names(reference.tensors, other.tensors, where=other.name)
    return other if fit is None else replace(other, tensors={new: other.tensors[old] for new, old in fit.names.items()})


def refuse_unlike(facts: Sequence[Facts], given: Normalisation | None = None) -> list[str]:
    """The notes on differences that are not refused; MergeMismatch lists every refused one, against the first model.

    `given` is the normalisation of the loader's images, None where the recipe does not state it.
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
            hint="follow the advice in the list, or leave a model out; nothing was trained or built yet",
        )
    return notes


def _list_compared(recipe: Recipe) -> tuple[Source, ...]:
    """The models, and their base if a merge of the recipe needs it."""
    needed = any(METHODS[way.merge].base for way in (choose(recipe), *recipe.compare))
    return list_sources(recipe) if needed else recipe.models


def _write(findings: Sequence[Finding], where: str) -> list[str]:
    """One line per finding, and the remedy below each group of findings that share it."""
    lines = []
    for remedy, group in groupby(findings, key=lambda one: one.remedy):
        texts = [one.text for one in group]
        lines += [f"  {where}: {text}" for text in texts[:_SHOWN]]
        if len(texts) > _SHOWN:
            lines.append(f"  {where}: and {len(texts) - _SHOWN} more of this kind")
        lines.append(f"    → {remedy}")
    return lines


def compare_tensors(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Compare names and shapes of all that is trained."""
    shapes = [
        {name: header.shape for name, header in one.tensors.items() if not is_constant(name, header)}
        for one in (reference, other)
    ]
    for name in find_padding(reference, other):
        del shapes[0][name], shapes[1][name]
    for line in list_differences(shapes[0], shapes[1]):
        ending = line.rpartition(": ")[2]
        remedy = TENSORS.get(ending, TENSORS["shape"])
        yield Finding(line, remedy.format(reference=reference.name, other=other.name))


def compare_types(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Compare stored types: floating-point types are all cast to float32; packed types cannot be averaged."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in sorted(reference.tensors.keys() & other.tensors.keys()):
        pair = (other.tensors[name].dtype, reference.tensors[name].dtype)
        if pair[0] != pair[1] and not is_constant(name, reference.tensors[name]):
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
    """Compare configurations: with another epsilon, rotation or activation equal weights are another function."""
    if not reference.settings or not other.settings:
        return
    keys = sorted(reference.settings.keys() | other.settings.keys())
    if find_padding(reference, other):
        keys.remove("vocab_size")
    for pattern, (remedy, refused) in SETTINGS.items():
        matching = [key for key in keys if fnmatch.fnmatchcase(key, pattern)]
        keys = [key for key in keys if key not in matching]
        for key in matching:
            found, wanted = other.settings.get(key), reference.settings.get(key)
            if found != wanted:
                yield Finding(f"{key} is {found!r} instead of {wanted!r}", remedy, refused=refused)


def compare_padding(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Note tables with rows that no token has: the tokenizers are one and the same."""
    padding = find_padding(reference, other)
    if padding:
        mine, theirs = next(iter(padding.values()))
        yield Finding(
            f"{_list(sorted(padding))}: {mine} rows instead of {theirs} for the same {len(other.tokens)} tokens",
            f"made {theirs} rows, as {reference.name} has them: no token has the others",
            refused=False,
        )


def compare_labels(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Compare class names: another order is corrected, other names mean another task."""
    wanted, found = reference.labels, other.labels
    if wanted == found:
        return
    if not wanted or not found:
        unnamed, named = (other, reference) if wanted else (reference, other)
        yield Finding(
            f"{unnamed.name} names no classes",
            f"assumed to be in the order of {named.name}'s; if not, write `labels`",
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
            "if two names mean the same class, write `labels` in [[models]]; else train both on one list of classes",
        )


def compare_vocabularies(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Compare vocabularies: row i of an embedding must be the same token in every model."""
    wanted, found = reference.tokens, other.tokens
    if wanted == found:
        return
    if not wanted or not found:
        empty = other if wanted else reference
        text = f"{empty.name} comes without tokenizer files"
        yield Finding(text, "its vocabulary is assumed to be the other model's", refused=False)
        return
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    moved = [token for token in wanted.keys() & found.keys() if wanted[token] != found[token]]
    if missing or extra:
        yield Finding(
            f"vocabulary of {len(found)} tokens instead of {len(wanted)}: missing {_list(missing) or 'none'}; extra"
            f" {_list(extra) or 'none'}",
            "train both with one tokenizer: add the tokens to the smaller one and resize its embedding",
        )
    if moved:
        yield Finding(
            f"{len(moved)} tokens have another number, among them {_list(sorted(moved))}",
            f"put the rows of {other.name}'s embedding in {reference.name}'s order and save both with one tokenizer",
        )


def compare_preparation(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Compare the preparation of text or images: the loader can do it in one way only."""
    for key, (remedy, refused) in PREPARATION.items():
        if key not in reference.preparation or key not in other.preparation:
            continue
        found, wanted = other.preparation[key], reference.preparation[key]
        if found != wanted:
            yield Finding(f"{key} is {found!r} instead of {wanted!r}", remedy, refused=refused)


def compare_normalisations(reference: Facts, other: Facts, given: Normalisation | None) -> Iterator[Finding]:
    """Compare input normalisations: if the recipe states the loader's, others are folded to it; else a refusal."""
    wanted, found = reference.normalise, other.normalise
    if given is None and wanted is not None and found is not None and not found.is_like(wanted):
        yield Finding(
            f"input normalisation is mean {list(found.mean)}, std {list(found.std)} instead of mean"
            f" {list(wanted.mean)}, std {list(wanted.std)}",
            "write the normalisation of the loader's images ([data] normalise): others are folded into first layers",
        )


def compare_files(reference: Facts, other: Facts, _given: Normalisation | None) -> Iterator[Finding]:
    """Note two models with the same file: allowed, but likely a mistake in the recipe."""
    if reference.files and reference.files == other.files:
        yield Finding("both are the same file", "merging them changes nothing", refused=False)


RULES: dict[str, Rule] = {
    "tensors": compare_tensors,
    "types": compare_types,
    "settings": compare_settings,
    "padding": compare_padding,
    "labels": compare_labels,
    "vocabularies": compare_vocabularies,
    "preparation": compare_preparation,
    "normalisations": compare_normalisations,
    "files": compare_files,
}


def _order_labels(reference: Facts, other: Facts) -> tuple[int, ...]:
    """The row in the other's head of each of the reference's classes; empty if nothing has to move."""
    if not other.labels or not reference.labels or other.labels == reference.labels:
        return ()
    return tuple(other.labels.index(label) for label in reference.labels)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) if " " in name else name for name in names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")
