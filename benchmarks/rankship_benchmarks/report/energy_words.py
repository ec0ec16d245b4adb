"""Energy as text and tables, for the terminal and the page, always with the meter's provenance."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rankship_benchmarks.judge.energy_figures import CaseEnergy, EnergyEstimate
from rankship_benchmarks.judge.summary import TIMES, Result, Summary
from rankship_benchmarks.report.words import UNKNOWN, show_ratio_interval
from rankship_pipeline.foundation.console import start_table

if TYPE_CHECKING:
    from rich.console import Console

PROVENANCE = {
    "measured": "measured by a sensor or meter",
    "counter": "counted by the device itself",
    "modelled": "modelled from utilisation, not measured",
}
_UNITS = ((1e9, "J"), (1e6, "mJ"), (1e3, "µJ"), (1, "nJ"))
_DIGITS = 3


def print_energy(summary: Summary, console: "Console") -> None:
    """Print a run's energy figures and every reason against them, or why there are none."""
    if summary.energy_note:
        console.print(f"No energy figure: {summary.energy_note}.", markup=False, highlight=False)
        return
    headings = ("total an\ninference", "above\nidle", "vs dense\n[95 %]", "idle\npower")
    table = start_table("format\nmodel", *headings)
    for result in list_energies(summary.results):
        energy = result.energy
        if energy is None:
            continue
        ratio = energy.ratio
        table.add_row(
            f"{result.key.format}\n{result.key.model}",
            show_energy(energy.total),
            show_energy(energy.marginal),
            f"{TIMES} {ratio.value:.2f}\n{show_ratio_interval(ratio)}" if ratio else UNKNOWN,
            show_power(energy.idle_uw),
            end_section=result.key.variant == "compressed",
        )
    console.print(table)
    for line in state_meter(summary):
        console.print(line, markup=False, highlight=False)
    for refusal in state_refusals(summary):
        console.print(f"! {refusal}", style="yellow", markup=False, highlight=False)


def list_energies(results: Iterable[Result]) -> list[Result]:
    """Keep the results that have energy figures."""
    return [one for one in results if one.energy is not None]


def state_meter(summary: Summary) -> Iterator[str]:
    """Yield lines that name the meter, how long it measured, and what ± includes."""
    plan = summary.header.energy
    energies = [one.energy for one in summary.results if one.energy is not None]
    if plan is None or not energies:
        return
    first = energies[0]
    rounds = f"{plan.choice.rounds} rounds of {plan.choice.busy_ms / 1000:g} s"
    yield (
        f"Energy {PROVENANCE[first.provenance]}: {first.meter}, {' + '.join(first.rails)}; {rounds} between rests of "
        f"{plan.choice.idle_ms / 1000:g} s, in separate trials."
    )
    calibration = _state_calibration(plan.calibration_ppm)
    yield f"± adds the meter's worst case{calibration} and 95 % over rounds; above idle: less the power at rest."


def state_refusals(summary: Summary) -> Iterator[str]:
    """Yield a line for each round or figure that does not count, with the artifact and the reason."""
    for result in list_energies(summary.results):
        for reason in result.energy.refused if result.energy else ():
            yield f"Energy of {result.key.title}: {reason}."


def show_energy(estimate: EnergyEstimate | None) -> str:
    """Show an energy as `12.4 ± 0.3 mJ`; a dash if there is none."""
    if estimate is None:
        return UNKNOWN
    scale, unit = energy_unit(estimate.value_nj)
    value, apart = estimate.value_nj / scale, estimate.uncertainty_nj / scale
    places = max(0, _DIGITS - len(str(int(abs(value)))))
    return f"{value:,.{places}f} ± {apart:,.{places}f} {unit}"


def energy_unit(value_nj: float) -> tuple[float, str]:
    """Choose the unit of an energy: its size in nJ, and its symbol."""
    return next(((scale, unit) for scale, unit in _UNITS if abs(value_nj) >= scale), _UNITS[-1])


def show_power(power_uw: int | None) -> str:
    """Show microwatts as watts."""
    return UNKNOWN if power_uw is None else f"{power_uw / 1e6:.2f} W"


def describe_estimate(estimate: EnergyEstimate | None) -> str:
    """Describe in small print the meter's part of a figure's ±."""
    if estimate is None or not estimate.value_nj:
        return ""
    return f"meter ± {estimate.bound_nj / abs(estimate.value_nj):.2%}"


def name_provenance(energy: CaseEnergy) -> str:
    """Name the meter and its provenance: `hwmon, measured`."""
    return f"{energy.meter}, {energy.provenance}"


def _state_calibration(calibration_ppm: int | None) -> str:
    return " without a calibration" if calibration_ppm is None else f" with {calibration_ppm / 1e4:g} % calibration"
