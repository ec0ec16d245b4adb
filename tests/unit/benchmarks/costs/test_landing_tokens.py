"""Landing a language model's budget for a token: a table of one phase, and the file timed in that phase."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from make.artifacts import DENSE, make_artifact
from make.devices import make_local
from make.token_files import GENERATION
from make.writers import save_writer, write_text
from rankship_benchmarks.costs import landing as land
from rankship_benchmarks.costs import landing_search
from rankship_benchmarks.costs.runtime_on_device import SINGLE_LAYER, Place, Subject, choose_place
from rankship_benchmarks.verbs.costs import list_parts, name_table
from rankship_pipeline.flow.build import build_recipe
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.show import state_landing
from rankship_pipeline.foundation.artifact_key import DECODE, prefill_of
from rankship_pipeline.foundation.codec import digest, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import BudgetInfeasible, InputError
from rankship_pipeline.foundation.records import CostTable, Factors, LayerCost
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.rules import read_recipe
from rankship_targets.session.session import open_session
from rankship_targets.trials.request import MeasureRequest
from rankship_targets.trials.trial import Trial

RECIPE = """
name = "writer"
[[models]]
name = "writer"
huggingface = "writer"
[data]
text = "corpus.txt"
tokens = 16
calibration_samples = 8
test_samples = 8
[budget]
token_ms = 0.001
prompt_tokens = 8
on = "here"
costs = "cost-table.json"
[ranks]
step = 4
forms = ["svd", "width"]
sensitivity = "relative"
[parity]
samples = 2
[export]
formats = ["onnx"]
context = 40
"""
MLP = tuple(f"model.model.layers.0.mlp.{one}_proj" for one in ("gate", "up", "down"))
NEXT_MLP = tuple(name.replace("layers.0", "layers.1") for name in MLP)


def make_table(
    prepared: Prepared, place: Place, costly: Sequence[str] = MLP, others: Sequence[str] = (), part: str = DECODE
) -> CostTable:
    """A table in which one block's MLP is nearly all of the time; it is cheap with 16 neurons, `others` as before."""
    layers = {}
    for layer in prepared.layers:
        dense, narrow = (90_000, 9_000) if layer.name in costly else (10, 10)
        ways: tuple[LayerCost, ...] = ()
        if layer.name in {*costly, *others}:
            reads = layer.name.endswith("down_proj")
            width = Factors(form="width", rank=32 if reads else 16, input_rank=16 if reads else None)
            ways = (LayerCost(factors=width, cost=narrow),)
        layers[layer.name] = (LayerCost(factors=None, cost=dense), *ways)
    return CostTable(
        unit="ns",
        device="here",
        format="onnx",
        runtime=place.runtime,
        threads=1,
        agent_sha256=place.session.agent_sha256,
        measured_utc="2026-11-29T00:00:00Z",
        rounds=9,
        model_sha256=prepared.hash_model(part, "onnx"),
        dense=280_000,
        fixed=280_000 - sum(options[0].cost for options in layers.values()),
        layers=layers,
        part=part,
        prompt_tokens=8,
    )


def watch_timing(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """All trials of places from now on."""
    timed: list[Trial] = []
    real = Place.time

    def time(place: Place, *given: object) -> list[Trial]:
        timed.extend(real(place, *given))  # type: ignore[arg-type]
        return timed[-len(given[0]) :]  # type: ignore[arg-type]

    monkeypatch.setattr(Place, "time", time)
    return timed


@pytest.mark.slow
def test_neurons_are_left_out_until_a_token_is_fast_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_writer(tmp_path / "writer")
    write_text(tmp_path / "corpus.txt")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    recipe, here = read_recipe(tmp_path / "recipe.toml"), make_local(tmp_path / "work")
    plain = prepare(replace(recipe, budget=Budget(kept_parameters=1.0)), tmp_path)
    assert list_parts(plain, 16, with_energy=False) == [(prefill_of(16), 16), (DECODE, 16)]
    with pytest.raises(InputError, match="--prompt-tokens is 40: so many tokens and a token after them do not fit"):
        list_parts(plain, 40, with_energy=False)
    with open_session(here) as session:
        table = make_table(plain, choose_place(session, "onnx", 1))
    for changes, complaint in {
        ("prefill 8", 8): "the first token after a prompt of 8, the budget is for a token after a prompt of 8",
        (DECODE, 9): "a token after a prompt of 9, the budget is for",
    }.items():
        part, tokens = changes
        (tmp_path / "cost-table.json").write_text(encode(replace(table, part=part, prompt_tokens=tokens)))
        with pytest.raises(InputError, match=complaint):
            prepare(recipe, tmp_path)
    (tmp_path / "cost-table.json").write_text(encode(table))
    prepared, store, steps = prepare(recipe, tmp_path), Store(tmp_path / "store"), Steps(quiet=True)
    assert list_parts(prepared, None, with_energy=False) == [(DECODE, 8)]
    monkeypatch.setattr(land, "ROUNDS", 2)
    monkeypatch.setattr(landing_search, "has_landed", lambda *_: True)
    timed = watch_timing(monkeypatch)
    land.land_missing(prepared, store, here, tmp_path, steps)
    assert {one.key.part for one in timed} == {DECODE}
    build, _ = build_recipe(prepared, store, steps)
    assert build.landing is not None
    assert build.plan.factors.keys() == set(MLP)
    assert build.landing.shipped.predicted_ns == build.plan.total_cost == 280_000 - 3 * 81_000
    assert "for a token after a prompt of 8 in onnx on here: landed" in state_landing(build.landing)
    compressed = next(one for one in build.artifacts if one.key.variant == "compressed")
    assert compressed.sha256 in {one.artifact_sha256 for one in timed}, "the file that was timed is the one that ships"


@pytest.mark.slow
def test_a_prompt_and_a_token_are_landed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its time in another block, so that a plan for either alone leaves the other as slow as it was."""
    save_writer(tmp_path / "writer")
    write_text(tmp_path / "corpus.txt")
    both = RECIPE.replace("[budget]", "[budget]\ntime_to_first_token_ms = 0.001").replace(
        'costs = "cost-table.json"', ""
    )
    (tmp_path / "recipe.toml").write_text(both)
    prepared, here = prepare(read_recipe(tmp_path / "recipe.toml"), tmp_path), make_local(tmp_path / "work")
    store, steps, parts = Store(tmp_path / "store"), Steps(quiet=True), [prefill_of(8), DECODE]
    assert list_parts(prepared, None, with_energy=False) == [(part, 8) for part in parts]
    tables: list[CostTable] = []

    def measure(prepared: Prepared, _store: Store, place: Place, *_rest: object) -> CostTable:
        layers = (MLP, NEXT_MLP) if place.part == DECODE else (NEXT_MLP, MLP)
        tables.append(make_table(prepared, place, *layers, place.part))
        return tables[-1]

    monkeypatch.setattr(land, "measure_costs", measure)
    monkeypatch.setattr(land, "ROUNDS", 2)
    with pytest.raises(BudgetInfeasible, match=r"the budget is 1\.0 µs for (a|the first) token after a prompt of 8; "):
        land.land_missing(prepared, store, here, tmp_path, steps)
    monkeypatch.setattr(landing_search, "has_landed", lambda *_: True)
    timed = watch_timing(monkeypatch)
    land.land_missing(prepared, store, here, tmp_path, steps)
    build, _ = build_recipe(prepared, store, steps)
    assert build.landing is not None
    assert [one.part for one in build.landing.phases] == parts == [one.part for one in tables[-2:]]
    assert [one.table_sha256 for one in build.landing.phases] == [digest(one) for one in tables[-2:]]
    assert [one.shipped.predicted_ns for one in build.landing.phases] == [280_000 - 3 * 81_000] * 2
    assert {one.shipped.weight for one in build.landing.phases} == {0.5}
    assert build.plan.factors.keys() == {*MLP, *NEXT_MLP}
    compressed = next(one for one in build.artifacts if one.key.variant == "compressed")
    assert {"costs on here, prefill 8", "costs on here, decode", "costs on here, weight"} < set(
        compressed.source_sha256
    )
    files = {(one.artifact_sha256, one.key.part) for one in timed}
    assert {(compressed.sha256, part) for part in parts} < files, "the file that was timed is the one that ships"
    assert "1.0 µs for the first token after a prompt of 8 and 1.0 µs for a token" in state_landing(build.landing)
    monkeypatch.setattr(land, "open_session", lambda *_, **__: pytest.fail("it was landed before"))
    land.land_missing(prepared, store, here, tmp_path, steps)


def test_a_prompt_is_timed_fewer_times_than_a_token() -> None:
    generating = make_artifact(generation=replace(GENERATION, prompt_tokens=9))
    subject = Subject("", "dense", replace(generating, key=replace(DENSE, part=DECODE)), "remote", ("tokens",))
    asked = [
        Place(None, "onnx", "r", 1, part, 9).make_request(subject, 3, SINGLE_LAYER)  # type: ignore[arg-type]
        for part in (DECODE, prefill_of(9))
    ]
    assert [one.min_samples for one in asked] == [SINGLE_LAYER[0], 5]
    assert [one.generation for one in asked] == [generating.generation] * 2
    assert {one.key.part for one in asked} == {DECODE}


def test_parts_of_a_model_are_timed_beside_the_rest_of_it() -> None:
    generating = replace(make_artifact(generation=GENERATION), size_bytes=900)
    probe, large = (replace(make_artifact(), size_bytes=size) for size in (100, 1000))
    asked: list[MeasureRequest] = []
    session: Any = SimpleNamespace(sweep=asked.extend)
    subjects = [Subject("", "s", one, "remote", ()) for one in (probe, generating, large)]
    Place(session, "onnx", "r", 1, DECODE, 9).time(subjects, 0, SINGLE_LAYER)
    assert [one.beside_bytes for one in asked] == [800, 0, 0]
    asked.clear()
    Place(session, "onnx", "r", 1).time([subjects[0], subjects[2]], 0, SINGLE_LAYER)
    assert [one.beside_bytes for one in asked] == [0, 0], "other models are timed warm"


def test_a_phase_names_its_table() -> None:
    assert name_table(Path("out/costs.json"), prefill_of(64)) == Path("out/costs-prefill-64.json")
