"""The house: no circle, no room that imports to its right, and every package's doors to the others in one list."""

from collections.abc import Iterator
from functools import cache

import grimp
import pytest

PACKAGES = ("rankship", "rankship_pipeline", "rankship_targets", "rankship_benchmarks")
# What a package shows to those above it; all else is its own. (importing package, imported package): rooms or modules.
DOORS = {
    ("rankship", "rankship_pipeline"): {
        "foundation",
        "recipe",
        "flow",
        "factors.saved_model",
        "models.data",
        "models.huggingface",
        "models.layers",
        "models.model_config",
        "models.plain_modules",
        "models.settle",
        "models.source",
        "models.weights",
        "stream.choice",
        "stream.job",
    },
    ("rankship", "rankship_targets"): {"devices"},
    ("rankship", "rankship_benchmarks"): {
        "bundle",
        "costs.landing",
        "fleet",
        "judge.summary",
        "measure",
        "report",
    },
    ("rankship_targets", "rankship_pipeline"): {"foundation"},
    ("rankship_benchmarks", "rankship_pipeline"): {
        "foundation",
        "recipe",
        "flow",
        "verbs",
        "evaluate.accuracy",
        "evaluate.perplexity",
        "evaluate.zero_shot",
        "export",
        "factors.analysis",
        "models.model_config",
        "ranks.budget",
        "ranks.call_sites",
        "ranks.ladders",
        "ranks.price",
        "recover.refine",
        "stream.choice",
        "stream.job",
    },
    ("rankship_benchmarks", "rankship_targets"): {
        "devices",
        "trials",
        "session",
        "client.agent_file",
        "client.detached",
        "meters.integrate",
    },
}


@cache
def draw_imports() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def list_imports() -> Iterator[tuple[str, str]]:
    graph = draw_imports()
    for module in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            yield module, imported


def find_circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other, by taking away again and again what imports nothing that is left."""
    left = {module: set(imported) for module, imported in arrows.items()}
    while free := {module for module, imported in left.items() if not imported & left.keys()}:
        left = {module: imported for module, imported in left.items() if module not in free}
    return [set(left)] if left else []


def test_a_circle_is_found() -> None:
    assert find_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [{"a", "b", "c"}]


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = draw_imports()
    assert find_circles({one: graph.find_modules_directly_imported_by(one) for one in graph.modules}) == []


@pytest.mark.parametrize("pair", DOORS, ids=" -> ".join)
def test_packages_use_each_other_by_their_doors_alone(pair: tuple[str, str]) -> None:
    above, below = pair
    found = {
        imported.removeprefix(f"{below}.")
        for module, imported in list_imports()
        if module.split(".")[0] == above and imported.split(".")[0] == below and imported != below
    }
    used = {door for door in DOORS[pair] for one in found if f"{one}.".startswith(f"{door}.")}
    assert found
    assert {one for one in found if not any(f"{one}.".startswith(f"{door}.") for door in DOORS[pair])} == set()
    assert DOORS[pair] == used, "a door that nobody uses is none"
