"""Cost tables of energy: every option of a time table is metered between two rests.

The arithmetic is that of times (sweeps.py), over rounds of metered trials in place of sweeps. Energies are totals:
the rails' energy while inferences ran, including what the board itself used.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from rankship_benchmarks.bundle.suite import EnergyChoice, EnergyPlan, plan_energy
from rankship_benchmarks.costs.runtime_on_device import WHOLE_MODEL, Place, Subject
from rankship_benchmarks.costs.sweeps import MODEL, BySweep, Offer, SiteCosts
from rankship_benchmarks.costs.time_table import LayerTimes, name_journal, time_layers
from rankship_benchmarks.costs.timings import Lines
from rankship_benchmarks.judge.energy_figures import read_trial
from rankship_benchmarks.judge.energy_round import RoundEnergy
from rankship_benchmarks.measure.energy_rounds import stretch, watch
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import MeasurementError
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import CostTable
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.ranks.call_sites import Site
from rankship_targets.client.detached import make_ticket
from rankship_targets.session.metered import check_meter, require_meter
from rankship_targets.trials.trial import MeteredTrial

_NJ_PER_UJ = 1000


@record
class Watched:
    """One subject metered in one round; `site` is empty for the whole model."""

    round: int
    site: str
    subject: str
    metered: MeteredTrial


Read = Sequence[tuple[Watched, RoundEnergy | str]]  # each trial's figures, or why it does not count


def collect_energies(read: Read, site: str, *, rounds_inputs: bool = False) -> SiteCosts:
    """Collect one site's total energies in nJ per inference by round, and the reasons of those that do not count."""
    energies: dict[str, BySweep] = {}
    reasons: list[str] = []
    for one, energy in read:
        if one.site not in {site, ""}:
            continue
        if isinstance(energy, str):
            reasons.append(f"{one.subject}, round {one.round}: {energy}")
        else:
            energies.setdefault(one.subject, {})[one.round] = energy.total.value_nj
    return SiteCosts(energies, lambda: refuse_energies(reasons), rounds_inputs)


def measure_energies(
    prepared: Prepared, store: Store, place: Place, results: Path, steps: Steps, choice: EnergyChoice
) -> CostTable:
    """Time a recipe's layers, then meter the options to offer; returns a table in µJ. An interrupted run resumes.

    Kinds of layer under 1 % of the model's time are not metered: they stay dense, at their share of its time.
    InputError if the inventory names no meter, Lacks if it cannot be read, both before anything is timed.
    """
    plan = plan_energy(choice, require_meter(place.session.device))
    check_meter(place.session)
    table = time_layers(prepared, store, place, results, steps)
    key = digest({"times": name_journal(prepared, place), "energy": plan})
    journal = Lines(Watched, results / f"energies-{prepared.recipe.name}-{place.device}-{key[:12]}.jsonl")
    subjects = table.make({site: [one.stored for one in some] for site, some in table.offers.items()})
    _watch(subjects, place, journal, steps, choice)
    return _price(table, journal.lines, plan)


def _watch(
    subjects: Sequence[Subject], place: Place, journal: Lines[Watched], steps: Steps, choice: EnergyChoice
) -> None:
    """Meter every subject once per round, in alternating order; what is in the journal is not repeated."""
    done = {(one.round, one.site, one.subject) for one in journal.lines}
    rounds = [(number, subjects if number % 2 == 0 else subjects[::-1]) for number in range(choice.rounds)]
    wanted = [(number, one) for number, some in rounds for one in some if (number, one.site, one.name) not in done]
    with steps.track(f"meter layers on {place.device}", len(wanted)) as advance:
        for number, subject in wanted:
            advance(f"meter layers on {place.device}: round {number + 1} of {choice.rounds}")
            metered = _take(subject, number, place, choice)
            journal.append(Watched(round=number, site=subject.site, subject=subject.name, metered=metered))


def _take(subject: Subject, number: int, place: Place, choice: EnergyChoice) -> MeteredTrial:
    session, ticket = place.session, make_ticket()
    try:
        return watch(stretch(place.make_request(subject, number, WHOLE_MODEL), choice), session, ticket)
    finally:
        session.forget(ticket)


def _price(table: LayerTimes, watched: Sequence[Watched], plan: EnergyPlan) -> CostTable:
    read = read_all(watched, plan)
    alone = table.prepared.activations == "dynamic"
    energies = {site: collect_energies(read, site.name, rounds_inputs=alone) for site in table.offers}
    shares = {site: energies[site].share() if site in energies else table.share(site) for site in table.kinds}
    offers: dict[Site, list[Offer]] = {}
    for site, some in table.offers.items():
        ratios = [(one.stored, energies[site].ratio(one.stored)) for one in some]
        offers[site] = [Offer(stored=stored, ratio=ratio) for stored, ratio in ratios if ratio is not None]
    latest = max(one.metered.trial.started_utc for one in watched)
    return table.price("uj", find_model_uj(read), shares, offers, latest, plan.choice.rounds)


def read_all(watched: Iterable[Watched], plan: EnergyPlan) -> Read:
    """Read every metered trial once."""
    return [(one, read_trial(one.metered, plan)) for one in watched]


def find_model_uj(read: Read) -> int:
    """Return the whole dense model's energy of one inference in µJ: the median over rounds."""
    readings = [energy for one, energy in read if one.subject == MODEL]
    found = [one.total.value_nj for one in readings if not isinstance(one, str)]
    if not found:
        raise refuse_energies([one for one in readings if isinstance(one, str)])
    return round(median(found) / _NJ_PER_UJ)


def refuse_energies(reasons: Sequence[str]) -> MeasurementError:
    """Make the error for a layer without a round that counts, with the first reason."""
    first = f", first of {len(reasons)}: {reasons[0]}" if reasons else ""
    return MeasurementError(
        f"cost table: no round counts{first}", hint="fix what the message names, and run the command again"
    )
