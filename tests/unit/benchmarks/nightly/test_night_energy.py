"""Energy in nights, in the index and in MLflow's metrics: what the meter said, or that it said nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from make.bundles import keep
from make.nights import make_device_night, make_night
from make.power import BASE, ROUNDS, TRUE_NJ, make_metered
from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.index.index import refresh_own_index
from rankship_benchmarks.index.mlflow_export import list_metrics, list_parameters
from rankship_benchmarks.index.tables import CASES
from rankship_benchmarks.nightly.explain import Evidence
from rankship_benchmarks.nightly.judge import judge_device, state_exit
from rankship_benchmarks.nightly.page import list_alarms, list_energies, render_page, state_headline
from rankship_benchmarks.nightly.records import DeviceNight, NightRecord, list_nights, write_night

DEVICE = "pi4"


def tell(run: str) -> DeviceNight:
    return replace(make_device_night(DEVICE, None), run=run)


def make_judged_night(number: int, one: DeviceNight) -> NightRecord:
    return replace(
        make_night(number, [one]), recipe=BASE.header.recipe, build_sha256=BASE.header.build_sha256, exit_code=None
    )


def judge(results: Path, tonight: Bundle, *before: Bundle) -> NightRecord:
    """Judge one night after others, by what lies on disk."""
    nights = []
    for number, bundle in enumerate(before):
        keep(results / str(number), bundle)
        nights.append(make_judged_night(number, tell(str(number))))
    keep(results / "tonight", tonight)
    night = make_judged_night(len(before), tell("tonight"))
    evidence = Evidence(results, [*nights, night])
    return make_judged_night(len(before), judge_device(evidence, night.devices[0], {}))


@pytest.mark.parametrize(("factor", "word", "status"), [(1.05, "worse", 1), (0.95, "better", 0), (1.0, "same", 0)])
def test_a_nights_energy_has_words_of_its_own_that_the_exit_status_counts(
    tmp_path: Path, factor: float, word: str, status: int
) -> None:
    night = judge(tmp_path, make_metered(factor=factor, seed=5), make_metered())
    energies = night.devices[0].energies
    assert [(one.key.variant, one.verdict) for one in energies] == [("dense", word), ("compressed", word)]
    assert [one.ratio.value for one in energies if one.ratio] == pytest.approx([factor] * 2, rel=0.01)
    assert state_exit(night) == status
    assert len(list_alarms(night)) == 2 * status
    assert f"energy: 2 {word}" in state_headline(night)
    page = render_page(night, [night], {})
    assert all(line.split(": ")[1] in page for line in list_energies(night))
    write_night(tmp_path, night)
    assert list_nights(tmp_path) == [night]


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ([], "no earlier night counts"),
        ([BASE], "the last night that counts has no energy"),
        (
            [make_metered(provenance="counter")],
            "energy was measured differently: meter was test (counter), is test (measured)",
        ),
    ],
)
def test_an_energy_without_its_like_is_unknown_and_says_why(tmp_path: Path, before: list[Bundle], reason: str) -> None:
    night = judge(tmp_path, make_metered(), *before)
    assert {(one.verdict, one.reason, one.ratio) for one in night.devices[0].energies} == {("unknown", reason, None)}
    assert state_exit(night) == 0


def test_a_night_without_a_meter_says_nothing_of_energy(tmp_path: Path) -> None:
    night = judge(tmp_path, BASE, make_metered())
    assert night.devices[0].energies == ()
    assert "Energy" not in render_page(night, [night], {})


def test_the_index_holds_energies_with_how_they_are_known_and_nulls_without_a_meter(tmp_path: Path) -> None:
    keep(tmp_path / "with", make_metered())
    keep(tmp_path / "without", replace(BASE, header=replace(BASE.header, run_id="without")))
    with refresh_own_index(tmp_path).connect() as connection:
        rows = connection.execute(select(CASES).order_by(CASES.c.run)).all()
    told = {one.variant: one for one in rows if one.energy_nj is not None}
    assert {one.format for one in told.values()} == {"onnx"}
    assert len([one for one in rows if one.energy_nj is not None]) == 2
    for variant, truth in TRUE_NJ.items():
        one = told[variant]
        assert abs(one.energy_nj - truth) <= one.energy_uncertainty_nj
        assert 0 < one.marginal_nj < one.energy_nj
        assert (one.meter, one.provenance, one.energy_rounds) == ("test", "measured", ROUNDS)


def test_mlflow_gets_energies_and_the_meters_word_only_where_there_are_some() -> None:
    metrics = list_metrics(make_metered())
    assert metrics["onnx.dense.energy_nj"] == pytest.approx(TRUE_NJ["dense"], rel=0.01)
    assert 0 < metrics["onnx.dense.energy_uncertainty_nj"] < metrics["onnx.dense.energy_nj"]
    assert metrics["onnx.compressed.energy_ratio"] == pytest.approx(3.7 / 5.1, rel=0.01)
    assert list_parameters(make_metered())["energy meter"] == "test measured"
    assert not [name for name in list_metrics(BASE) if "energy" in name or "marginal" in name]
    assert "energy meter" not in list_parameters(BASE)
