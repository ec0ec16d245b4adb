"""A language model's table of one phase, measured on this machine: tied heads, and neurons left out together."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from make.devices import make_local
from make.writers import save_writer, write_text
from rankship_benchmarks.costs import time_table as costs
from rankship_benchmarks.costs.runtime_on_device import Place, Subject, choose_place
from rankship_benchmarks.costs.time_table import measure_costs
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.foundation.artifact_key import WHOLE, prefill_of
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.ranks.price import price_table
from rankship_pipeline.recipe.rules import read_recipe
from rankship_targets.session.session import open_session
from rankship_targets.trials.trial import Trial

RECIPE = """
name = "writer"
data.text = "corpus.txt"
data.tokens = 16
budget.kept_parameters = 0.8
ranks.step = 16
ranks.forms = ["svd", "width"]
export.formats = ["onnx"]
export.context = 40
parity.samples = 2
[[models]]
name = "writer"
huggingface = "writer"
"""
MLP = "model.model.layers.1.mlp."


@pytest.mark.slow
def test_layers_are_timed_as_a_prompt_passes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_writer(tmp_path / "writer")
    write_text(tmp_path / "corpus.txt")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for name, value in {"SWEEPS": 6, "GRID": 3, "WORTH": 0.0}.items():
        monkeypatch.setattr(costs, name, value)
    prepared, timed = prepare(read_recipe(tmp_path / "recipe.toml"), tmp_path), list[Subject]()
    real = Place.time

    def time(place: Place, subjects: Sequence[Subject], number: int, _effort: object) -> list[Trial]:
        timed.extend(subjects)
        return real(place, subjects, number, (5, 1, 1))

    monkeypatch.setattr(Place, "time", time)
    part = prefill_of(9)
    with open_session(make_local(tmp_path / "work")) as session:
        place = choose_place(session, "onnx", 1, part, 9)
        table = measure_costs(prepared, Store(tmp_path / "store"), place, tmp_path, Steps(quiet=True), passes=1)
    assert (table.part, table.prompt_tokens) == (part, 9)
    assert {one.artifact.key.part for one in timed} == {part, WHOLE}, "the whole model in its phase, layers as they are"
    rows = {one.site.split(" on ")[1].split()[0] for one in timed if one.site}
    assert rows == {"9", "9x32", "9x64", "1x32"}, "tokens of the embedding, rows of layers, one row of the head"
    named = {one.name for one in timed if one.site.startswith("linear 64→32 on 9x64")}
    assert {"width 16→32", "width 32→32", "width 48→32"} <= named
    price = price_table(table, prepared.layers, prepared.hash_model(part, "onnx"), "table")
    assert table.dense == price.price_dense(prepared.layers)
    widths = {
        name: {way.input_rank or way.rank for way in ways if way is not None and way.form == "width"}
        for name in ("gate_proj", "up_proj", "down_proj")
        for ways in ([one.factors for one in table.layers[f"{MLP}{name}"]],)
    }
    assert widths["gate_proj"] == widths["up_proj"] == widths["down_proj"], "what is on offer is so for all of them"
