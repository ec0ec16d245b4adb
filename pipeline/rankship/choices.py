"""What a call chose, as the records of a recipe: a name alone stands for its table with everything else by default."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast, get_args

from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.quality import QualityKind
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import FactoriseChoice, MergeChoice, QualityChoice, RankChoice, Whitening
from rankship_pipeline.recipe.draft import choose_formats
from rankship_pipeline.recipe.export_choices import AxisChoice, ExportChoice
from rankship_pipeline.recipe.merge_methods import METHODS, MergeMethod
from rankship_pipeline.recipe.precision import TYPES, PrecisionChoice
from rankship_pipeline.recipe.rank_methods import RankMethod


def check_name(given: object, known: Iterable[str], what: str) -> None:
    """InputError where a name is not known, with the nearest one."""
    names = list(known)
    if given in names:
        return
    nearest = difflib.get_close_matches(str(given), names, n=1)
    guess = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise InputError(f"unknown {what} {given!r}", hint=f"{guess}known are {', '.join(names)}")


def choose_ranks(given: RankMethod | RankChoice) -> RankChoice:
    """How ranks are allocated."""
    if isinstance(given, RankChoice):
        return given
    check_name(given, get_args(RankMethod), "ranks")
    return RankChoice(method=given)


def choose_factors(given: Whitening | FactoriseChoice) -> FactoriseChoice:
    """How factors are found."""
    if isinstance(given, FactoriseChoice):
        return given
    check_name(given, get_args(Whitening), "whitening")
    return FactoriseChoice(whitening=given)


def choose_merge(given: MergeMethod | MergeChoice) -> MergeChoice:
    """How models become one."""
    if isinstance(given, MergeChoice):
        return given
    check_name(given, METHODS, "merge method")
    return MergeChoice(method=given)


def choose_quality(given: str | QualityChoice | Callable[..., float] | None) -> QualityChoice:
    """How answers are judged: a kind's name, "file.py:function", or a function that lies in a file; None: as seen."""
    if given is None or isinstance(given, QualityChoice):
        return given or QualityChoice()
    if callable(given):
        given = _name_function(given)
    if ":" in given:
        return QualityChoice(function=given)
    check_name(given, get_args(QualityKind), "quality")
    return QualityChoice(kind=cast("QualityKind", given))


def _name_function(given: Callable[..., float]) -> str:
    """A function as "file.py:function"; InputError for one that no later session could find."""
    name = getattr(given, "__qualname__", type(given).__name__)
    try:
        file = inspect.getsourcefile(given)
    except TypeError:
        file = None
    if file is None or not Path(file).is_file() or not name.isidentifier():
        raise InputError(
            f"quality is {name}, which lies in no file: a stored score could not be told from another's",
            hint='write it into a file as a plain function, and give quality="file.py:function"',
        )
    return f"{Path(file).resolve()}:{name}"


def choose_precision(given: Precision | Sequence[Precision] | PrecisionChoice) -> PrecisionChoice:
    """The types that weights may have."""
    if isinstance(given, PrecisionChoice):
        return given
    types = (given,) if isinstance(given, str) else tuple(given)
    for name in types:
        check_name(name, TYPES, "type of weights")
    return PrecisionChoice(weights=types, formats=FORMATS)  # whatever is exported, the plan stays


def choose_budget(kept_parameters: float | None, size_bytes: int | None, budget: Budget | None) -> Budget:
    """The one budget of a call."""
    given = sum(one is not None for one in (kept_parameters, size_bytes, budget))
    if given != 1:
        raise InputError(
            "the budget is given twice" if given else "no budget",
            hint="give either kept_parameters=0.4, size_bytes=100_000 or budget=Budget(...)",
        )
    if budget is not None and budget.on is not None:
        raise InputError(
            f"a budget that is met by measuring on {budget.on} needs a recipe",
            hint="write it to a recipe file, then run(FILE); here, name a table of costs: Budget(latency_ms=, costs=)",
        )
    return budget or Budget(kept_parameters=kept_parameters, size_bytes=size_bytes)


def choose_export(
    given: Format | Sequence[Format] | None, batch: tuple[int, int] | None = None, axes: Sequence[AxisChoice] = ()
) -> ExportChoice:
    """What to export; None: every format whose toolchain is installed."""
    formats = (given,) if isinstance(given, str) else tuple(given or ())
    for name in formats:
        check_name(name, FORMATS, "format")
    return ExportChoice(formats=choose_formats(formats), batch=batch, axes=tuple(axes))
