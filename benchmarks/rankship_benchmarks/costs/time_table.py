"""Cost tables: every kind of layer of a model timed on a device, dense and at ranks that the timings choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rankship_benchmarks.costs.probes import LIMITS, Probe, make_probes
from rankship_benchmarks.costs.runtime_on_device import SINGLE_LAYER, Place, Subject
from rankship_benchmarks.costs.sweeps import (
    COPIES,
    MODEL,
    Offer,
    SiteCosts,
    collect_times,
    find_model_ns,
    join_ratios,
    list_wanted,
    price_layer,
)
from rankship_benchmarks.costs.timings import Journal, Sweep, Timing
from rankship_benchmarks.stats.estimates import Estimate
from rankship_benchmarks.stats.staircase import keep_steps, pick_rungs
from rankship_pipeline.export.capabilities import list_offered
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.records import CostTable, CostUnit, Stored
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import hash_code
from rankship_pipeline.ranks.call_sites import Site
from rankship_pipeline.ranks.ladders import Ladder, Rung, Types, list_ladders

SWEEPS = 9  # per pass: the fewest whose 95 % interval tolerates one outlier
PASSES = 4  # an even grid, then three bisections
PASSES_OF_BITS = 2  # of other types than float32: so at most 2 + 7 probes of one kind of layer, type and form
CHUNK = 60  # subjects per process: starting one takes longer than timing a subject
GRID = 4  # ranks of each form in the first pass
WORTH = 0.01  # share of the model's time: kinds of layer below it stay dense, their options are not measured
_BLOCK = 100  # sweep numbers of one chunk in one pass

Chunk = dict[Site, Sequence[Stored]]  # what one process times: sites and their options


def measure_costs(
    prepared: Prepared, store: Store, place: Place, results: Path, steps: Steps, *, passes: int = PASSES
) -> CostTable:
    """Measure a recipe's table of times; an interrupted measurement resumes at its first missing sweep."""
    return time_layers(prepared, store, place, results, steps, passes=passes).finish()


def time_layers(
    prepared: Prepared, store: Store, place: Place, results: Path, steps: Steps, *, passes: int = PASSES
) -> "LayerTimes":
    """Time the layers that take WORTH of the time, in `passes` passes; the result's `offers` are their options."""
    table = LayerTimes(prepared, store, place, steps)
    table.journal = Journal(results / f"{name_journal(prepared, place)}.jsonl")
    worth, ladders = table.find_worthy()
    steps.note(f"{len(worth)} of {len(table.kinds)} kinds of layer take {WORTH:.0%} of the model's time or more")
    for number in range(1, passes + 1):
        wanted = table.pick_options(ladders)
        if not wanted:
            break
        table.time_options(number, wanted)
    table.offers = {site: table.list_offers(site) for site in worth}
    return table


@dataclass
class LayerTimes:
    """A table being measured: what was pushed, timed, and planned in each pass."""

    prepared: Prepared
    store: Store
    place: Place
    steps: Steps
    journal: Journal = field(init=False)
    offers: dict[Site, list[Offer]] = field(init=False)
    planned: dict[Ladder, list[list[int]]] = field(default_factory=dict)
    _costs: dict[Site, SiteCosts] = field(default_factory=dict)
    _pushed: dict[tuple[str, str], Subject] = field(default_factory=dict)

    def __post_init__(self) -> None:
        everywhere = self.prepared.list_sites(self.place.part, self.place.format)
        self.sites = {layer.name: everywhere[layer.name] for layer in self.prepared.layers}
        self.kinds = list(dict.fromkeys(site for some in self.sites.values() for site in some))
        offered = (self.prepared.offered, list_offered((self.place.format,), self.prepared.activations))
        self._types = Types(self.prepared.recipe.precision.weights, offered)

    def find_worthy(self) -> tuple[list[Site], list[Ladder]]:
        """Time every kind of layer dense in every type; returns those to measure further, and their ladders.

        These are worth WORTH of the model's time in float32, by themselves or with the others of a ladder.
        """
        dense = {site: [Stored(weights=one) for one in self._types.list_types(site.layer)] for site in self.kinds}
        self.time_options(0, dense)
        first = [
            one for one in self.journal.timings if one.sweep < _BLOCK * _BLOCK
        ]  # sweeps of later passes must not change the choice
        calls = {site: sum(some.count(site) for some in self.sites.values()) for site in self.kinds}
        shares = {site: calls[site] * collect_times(first, site.name).share().value for site in self.kinds}
        ranks = self.prepared.recipe.ranks
        found = list_ladders(self.prepared.layers, self.sites, ranks.step, ranks.forms, self._types)
        ladders = [one for one in found if sum(shares[site] for site in one.sites) >= WORTH]
        worth = {site for one in ladders for site in one.sites}
        return [site for site in self.kinds if shares[site] >= WORTH or site in worth], ladders

    def pick_options(self, ladders: Sequence[Ladder]) -> dict[Site, list[Stored]]:
        """Choose what to measure of each site in the next pass, from the times so far."""
        chosen: dict[Site, dict[Stored, None]] = {}
        for ladder in ladders:
            passes = self.planned.setdefault(ladder, [])
            if ladder.weights != "float32" and len(passes) == PASSES_OF_BITS:
                continue
            passes.append(pick_rungs(len(ladder.rungs), [self._read(ladder, one) for one in passes], GRID))
            for site, stored in (way for place in passes[-1] for way in ladder.rungs[place]):
                chosen.setdefault(site, {})[stored] = None
        return {site: list(chosen[site]) for site in self.kinds if site in chosen}

    def time_options(self, number: int, wanted: Mapping[Site, Sequence[Stored]]) -> None:
        """Time one pass: every site's options beside its own dense layer and the whole model."""
        chunks: list[Chunk] = []
        for site, options in wanted.items():
            if not chunks or _count(chunks[-1]) + _count({site: options}) > CHUNK:
                chunks.append({})
            chunks[-1][site] = options
        self._run(number, chunks, f"pass {number}" if number else "dense layers")

    def list_offers(self, site: Site) -> list[Offer]:
        """List every other type's dense layer, and the last rank of each step of each form and type; with costs."""
        kept = {Stored(weights=one): None for one in self._types.list_types(site.layer) if one != "float32"}
        for ladder, passes in self.planned.items():
            if site in ladder.sites:
                measured = self._read(ladder, [place for one in passes for place in one])
                steps = [way for place in keep_steps(measured) for way in ladder.rungs[place]]
                kept |= {stored: None for at, stored in steps if at == site}
        times = self._collect(site)
        ratios = [(stored, times.ratio(stored)) for stored in kept]
        return [Offer(stored=stored, ratio=ratio) for stored, ratio in ratios if ratio is not None]

    def _collect(self, site: Site) -> SiteCosts:
        """Collect a site's times in ns, once for all that was timed so far."""
        if site not in self._costs:
            alone = self.prepared.activations == "dynamic"
            self._costs[site] = collect_times(self.journal.timings, site.name, rounds_inputs=alone)
        return self._costs[site]

    def finish(self) -> CostTable:
        """Return the table of all layers in ns."""
        shares, timings = {site: self.share(site) for site in self.kinds}, self.journal.timings
        latest = max(one.trial.started_utc for one in timings)
        offers = {site: self.list_offers(site) for site in self.kinds}
        return self.price("ns", find_model_ns(timings), shares, offers, latest, SWEEPS)

    def share(self, site: Site) -> Estimate:
        """Return one dense layer's share of the model's time."""
        return self._collect(site).share()

    def price(
        self,
        unit: CostUnit,
        dense: int,
        shares: Mapping[Site, Estimate],
        offers: Mapping[Site, Sequence[Offer]],
        measured_utc: str,
        rounds: int,
    ) -> CostTable:
        """Return the table of all layers in a unit; `dense` is the whole dense model's cost."""
        layers = {name: price_layer(some, shares, offers, dense) for name, some in self.sites.items()}
        return CostTable(
            unit=unit,
            device=self.place.device,
            format=self.place.format,
            runtime=self.place.runtime,
            threads=self.place.threads,
            activations=None if self.prepared.recipe.precision.weights == ("float32",) else self.prepared.activations,
            agent_sha256=self.place.session.agent_sha256,
            measured_utc=measured_utc,
            rounds=rounds,
            model_sha256=self.prepared.hash_model(self.place.part, self.place.format),
            part=self.place.part,
            prompt_tokens=self.place.prompt_tokens,
            dense=dense,
            fixed=dense - sum(options[0].cost for options in layers.values()),
            layers=layers,
        )

    def _read(self, ladder: Ladder, places: Sequence[int]) -> dict[int, Estimate]:
        """Read rungs' times as shares of the dense layers' of their own type, which is as exact as it gets."""
        found = {place: self._join(ladder.rungs[place], ladder.weights) for place in places}
        return {place: ratio for place, ratio in found.items() if ratio is not None}

    def _join(self, rung: Rung, weights: Precision) -> Estimate | None:
        """A rung's time as a share of its layers' dense in this type; None without a sweep that has both."""
        ratios = [self._collect(site).ratio(stored, weights) for site, stored in rung]
        known = [one for one in ratios if one is not None]
        if len(known) < len(ratios):
            return None
        return join_ratios(known, [self._weigh(site, weights) for site, _ in rung])

    def _weigh(self, site: Site, weights: Precision) -> float:
        """A dense layer's share of the model's time, in one of its types."""
        times = self._collect(site)
        ratio = times.ratio(Stored(weights=weights))
        return max(0.0, times.share().value) * (1.0 if ratio is None else ratio.value)

    def _model(self) -> Subject:
        if ("", MODEL) not in self._pushed:
            pushed = self.place.push_dense(self.prepared, self.store, self.steps)
            self._pushed["", MODEL] = replace(pushed, name=MODEL)
        return self._pushed["", MODEL]

    def _push(self, site: Site, options: Sequence[Stored]) -> list[Subject]:
        """Return a site's subjects (see list_wanted); each is made and pushed only once."""
        computed = self.prepared.activations
        wanted = {str(one): Probe(site, one.stored, one.copies, computed) for one in list_wanted(options)}
        missing = {name: probe for name, probe in wanted.items() if (site.name, name) not in self._pushed}
        artifacts = make_probes(list(missing.values()), self.place.format, self.store)
        for name, artifact in zip(missing, artifacts, strict=True):
            self._pushed[site.name, name] = self.place.push(site.name, name, artifact, self.store, LIMITS)
        return [self._pushed[site.name, name] for name in wanted]

    def make(self, chunk: Chunk) -> list[Subject]:
        """Make, verify and push the model, then every site's dense layer and options; returns them in this order."""
        with self.steps.track(f"make and prove {_count(chunk)} layers", len(chunk)) as advance:
            subjects = [self._model()]
            for site, options in chunk.items():
                advance(f"make and prove {site}")
                subjects += self._push(site, options)
        return subjects

    def _run(self, number: int, chunks: Sequence[Chunk], title: str) -> None:
        """Time every chunk once per sweep; every other sweep runs backwards, so that drift within it cancels."""
        places = range(len(chunks))
        order = [(place, turn) for turn in range(SWEEPS) for place in (places if turn % 2 == 0 else places[::-1])]
        numbered = [((number * _BLOCK + place) * _BLOCK + turn, place, turn) for place, turn in order]
        done = self.journal.done
        missing = [one for one in numbered if one[0] not in done]
        made = {place: self.make(chunks[place]) for place in sorted({place for _, place, _ in missing})}
        with self.steps.track(f"time {title} on {self.place.device}", len(missing)) as advance:
            for at, place, turn in missing:
                advance(f"time {title} on {self.place.device}: sweep {turn + 1} of {SWEEPS}")
                chunk = made[place] if turn % 2 == 0 else made[place][::-1]
                pairs = zip(chunk, self.place.time(chunk, at, SINGLE_LAYER), strict=True)
                timings = [Timing(sweep=at, site=one.site, subject=one.name, trial=trial) for one, trial in pairs]
                self.journal.append(Sweep(number=at, timings=tuple(timings)))
        self._costs.clear()


def _count(chunk: Mapping[Site, Sequence[Stored]]) -> int:
    """Count what a chunk times beside the whole model."""
    return sum(len(list_wanted(options)) for options in chunk.values())


def name_journal(prepared: Prepared, place: Place) -> str:
    """Name the journal by everything that its timings depend on."""
    ranks, types = prepared.recipe.ranks, prepared.recipe.precision.weights
    key = digest(
        {
            "model": prepared.hash_model(place.part, place.format),
            "layers": [layer.name for layer in prepared.layers],
            "ranks": [ranks.step, list(ranks.forms)],
            "types": [*types, prepared.activations, prepared.offered_sha256],
            "place": [place.device, place.format, place.runtime, place.threads, place.part, place.prompt_tokens],
            "agent": place.session.agent_sha256,
            "effort": [COPIES, SWEEPS, GRID, WORTH, *SINGLE_LAYER],
            "code": hash_code(),
        }
    )
    return f"costs-{prepared.recipe.name}-{place.device}-{key[:12]}"
