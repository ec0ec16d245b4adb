"""The inputs that each merge method needs and the keys that it takes, known before torch is imported."""

from collections.abc import Iterable, Mapping
from typing import Literal

from rankship_pipeline.foundation.frozen import record

MergeMethod = Literal[
    "average",
    "slerp",
    "model-stock",
    "task-arithmetic",
    "ties",
    "dare",
    "della",
    "fisher",
    "regmean",
    "joint",
    "sequential",
    "wudi",
    "tsv-m",
    "iso-c",
    "knots",
    "ctm",
]
DataNeed = Literal["none", "grams", "fisher"]


@record
class Needs:
    """What a method needs besides the models: the base that all were trained from, data, and its own keys.

    `defaults` are its keys with the paper's values; if the paper tunes a key on labels, with its advice without labels.
    """

    base: bool = False
    data: DataNeed = "none"
    defaults: Mapping[str, float]


# 0.4 is what Yadav et al. 2023 take for task arithmetic where nothing can be tuned; 0.2 and 1 are TIES' own.
METHODS: dict[MergeMethod, Needs] = {
    "average": Needs(defaults={}),
    "slerp": Needs(defaults={"position": 0.5}),
    "model-stock": Needs(base=True, defaults={}),
    "task-arithmetic": Needs(base=True, defaults={"scale": 0.4}),
    "ties": Needs(base=True, defaults={"density": 0.2, "scale": 1}),
    "dare": Needs(base=True, defaults={"drop": 0.2, "scale": 0.4}),
    "della": Needs(base=True, defaults={"drop": 0.5, "epsilon": 0.2, "scale": 1}),
    "fisher": Needs(data="fisher", defaults={"samples": 256}),
    "regmean": Needs(data="grams", defaults={"off_diagonal": 0.9}),
    "joint": Needs(data="grams", defaults={"off_diagonal": 1}),
    "sequential": Needs(data="grams", defaults={"off_diagonal": 1, "samples": 512}),
    "wudi": Needs(base=True, defaults={}),
    "tsv-m": Needs(base=True, defaults={"scale": 1}),
    "iso-c": Needs(base=True, defaults={"scale": 1}),
    "knots": Needs(base=True, defaults={"density": 0.2, "scale": 1}),
    "ctm": Needs(base=True, defaults={"core_rank": 0, "density": 0.2, "scale": 1}),
}
# key → lowest and highest value, and whether the highest is included
_RANGES: dict[str, tuple[float, float, bool]] = {
    "scale": (0, 10, True),
    "density": (0, 1, True),
    "drop": (0, 1, False),
    "epsilon": (0, 1, True),
    "position": (0, 1, True),
    "off_diagonal": (0, 1, True),
    "core_rank": (0, 1 << 20, True),
    "samples": (1, 1 << 20, True),
}
KEYS = tuple(_RANGES)  # the keys of a [merge] table besides method, head, base and batchnorm
RANDOM: tuple[MergeMethod, ...] = ("dare", "della")
_OF_SLERP = 2


def fill_settings(method: MergeMethod, given: Mapping[str, float]) -> dict[str, float]:
    """A method's own keys with the given or default values; other keys are left out."""
    return {key: given.get(key, default) for key, default in METHODS[method].defaults.items()}


def check_settings(
    methods: Iterable[tuple[str, MergeMethod]], given: Mapping[str, float], *, has_base: bool
) -> list[str]:
    """Complaints about the merges of one recipe, given as (place in the recipe, method), and the keys they share."""
    ways = list(methods)
    taken = {key for _, method in ways for key in METHODS[method].defaults}
    names = ", ".join(sorted({repr(method) for _, method in ways}))
    complaints = [
        f"merge.{key} is not used by {names}: it belongs to"
        f" {', '.join(name for name, needs in METHODS.items() if key in needs.defaults)}"
        for key in given
        if key not in taken
    ]
    for key, value in given.items():
        low, high, closed = _RANGES[key]
        if not (low <= value <= high and (closed or value < high)):
            complaints.append(f"merge.{key} must lie in [{low}, {high}{']' if closed else ')'}, got {value}")
    if given.get("density") == 0:
        complaints.append("merge.density = 0 keeps nothing of the models: give the share to keep, such as 0.2")
    for where, method in ways:
        settings = fill_settings(method, given)
        if METHODS[method].base and not has_base:
            complaints.append(
                f"{where}: {method!r} needs the base that all models were trained from: name it in merge.base"
            )
        if (
            "epsilon" in settings
            and not 0 <= settings["drop"] - settings["epsilon"] / 2 <= (settings["drop"] + settings["epsilon"] / 2) <= 1
        ):
            complaints.append(f"{where}: merge.drop ± merge.epsilon / 2 must lie in [0, 1], got {settings}")
    return complaints


def check_count(methods: Iterable[tuple[str, MergeMethod]], models: int) -> list[str]:
    """Complaints about merges that need another number of models."""
    return [
        f"{where}: 'slerp' merges exactly two models, got {models}"
        for where, method in methods
        if method == "slerp" and models != _OF_SLERP
    ]
