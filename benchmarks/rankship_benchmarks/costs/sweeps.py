"""Computes one layer's cost from sweeps in which it ran as several copies side by side.

One sweep is one process that runs within seconds: the whole dense model, the site's dense layer once and COPIES times,
and its options COPIES times each. With m, s, d and o their median times (or energies),

    layer = (d − s) / (COPIES − 1)        one dense layer, with the addition that joins it to the others
    overhead = s − layer                  reading the input and calling the runtime: paid once per inference
    option = (o − overhead) / COPIES      the same for a factored layer

Layers of fewer bits have an s, a d and so an overhead of their own: the copies share the rounding of their input too.
Its cost, that overhead less the one in float32, is added to each layer that in a model rounds its own input, as with
dynamic activations; between layers with static ones the numbers stay in 8 bits.

A dense layer is given as a share of m, an option as a share of the dense layer in the same sweep, so that a slower
device cancels. Sweeps are the unit of independence: medians and intervals are over sweeps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rankship_benchmarks.costs.timings import Timing
from rankship_benchmarks.judge.validity import keep_valid, refuse_trials
from rankship_benchmarks.stats.estimates import Estimate, estimate_median, estimate_ratio
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import RankshipError
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import LayerCost, Stored
from rankship_pipeline.ranks.call_sites import Site

COPIES = 4
MODEL = "model"

BySweep = dict[int, float]
Scaled = tuple[float, float | None, float | None]  # a cost and its interval


@record
class Wanted:
    """What is to be timed of a site: `copies` of its layer stored in one way."""

    stored: Stored
    copies: int = COPIES

    def __str__(self) -> str:
        """Its name: "dense", "dense once", "svd 24, int8"."""
        return f"{self.stored} once" if self.copies == 1 else str(self.stored)


@record
class Offer:
    """One way to store a site's layer and its cost as a share of the dense layer's in float32."""

    stored: Stored
    ratio: Estimate


def list_wanted(options: Iterable[Stored]) -> list[Wanted]:
    """List what has to be timed for some options of a site: dense once and as copies in each of their types, and they.

    Float32 comes first, with which everything is compared.
    """
    options = list(options)
    types = dict.fromkeys(Stored(weights=one) for one in ("float32", *(option.weights for option in options)))
    dense = [Wanted(stored=one, copies=copies) for one in types for copies in (1, COPIES)]
    return [*dense, *(Wanted(stored=one) for one in options if one not in types)]


@dataclass(frozen=True)
class SiteCosts:
    """The costs of one site's subjects and of the whole model by sweep, in one unit, without what does not count.

    `refuse` makes the error for a site without costs: it names what did not count, and why. `rounds_inputs` says
    whether every layer of fewer bits rounds its own input in a model.
    """

    costs: Mapping[str, BySweep]
    refuse: Callable[[], RankshipError]
    rounds_inputs: bool = False

    def dense(self, weights: Precision = "float32") -> BySweep:
        """Return one dense layer's cost by sweep, as copies share it; at or below zero if the noise is larger."""
        stored = Stored(weights=weights)
        single = self.costs.get(str(Wanted(stored=stored, copies=1)), {})
        several = self.costs.get(str(Wanted(stored=stored)), {})
        return {sweep: (several[sweep] - single[sweep]) / (COPIES - 1) for sweep in single if sweep in several}

    def cost(self, stored: Stored) -> BySweep:
        """Return one layer's cost by sweep, stored in some way."""
        overhead, taken = self._overhead(stored.weights), self.costs.get(str(stored), {})
        found = {sweep: (taken[sweep] - overhead[sweep]) / COPIES for sweep in taken if sweep in overhead}
        if stored.weights == "float32" or not self.rounds_inputs:
            return found
        plain = self._overhead("float32")
        return {sweep: cost + overhead[sweep] - plain[sweep] for sweep, cost in found.items() if sweep in plain}

    def _overhead(self, weights: Precision) -> BySweep:
        """What is paid once per inference, by sweep."""
        single = self.costs.get(str(Wanted(stored=Stored(weights=weights), copies=1)), {})
        return {sweep: single[sweep] - layer for sweep, layer in self.dense(weights).items()}

    def share(self) -> Estimate:
        """Return one dense layer's share of the whole dense model; raises `refuse()` without a sweep that has both."""
        model, dense = self.costs.get(MODEL, {}), self.dense()
        shares = [dense[sweep] / model[sweep] for sweep in dense if sweep in model]
        if not shares:
            raise self.refuse()
        return estimate_median(shares)

    def ratio(self, stored: Stored, weights: Precision = "float32") -> Estimate | None:
        """Return a layer's share of the dense one with such `weights`; None without a sweep that has both."""
        dense = {sweep: one for sweep, one in self.cost(Stored(weights=weights)).items() if one > 0}
        return estimate_ratio(self.cost(stored), dense)


def join_ratios(ratios: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Return what several layers together cost as a share of what they cost dense, which are the `weights`.

    Intervals are added up too, which errs on the wide side.
    """
    first = ratios[0]
    if all(one == first for one in ratios):
        return first
    total = sum(weights)
    shares = [one / total for one in weights] if total > 0 else [1 / len(weights)] * len(weights)

    def add(values: Sequence[float | None]) -> float | None:
        known = [one for one in values if one is not None]
        return sum(a * b for a, b in zip(shares, known, strict=True)) if len(known) == len(values) else None

    return Estimate(
        value=sum(share * one.value for share, one in zip(shares, ratios, strict=True)),
        low=add([one.low for one in ratios]),
        high=add([one.high for one in ratios]),
        confidence=first.confidence,
        rounds=min(one.rounds for one in ratios),
    )


def collect_times(timings: Iterable[Timing], site: str, *, rounds_inputs: bool = False) -> SiteCosts:
    """Collect one site's median times in ns, without trials that do not count."""
    mine = [one for one in timings if one.site in {site, ""}]
    times: dict[str, BySweep] = {}
    for one in mine:
        if keep_valid([one.trial]):
            times.setdefault(one.subject, {})[one.sweep] = median(one.trial.samples_ns)
    return SiteCosts(times, lambda: refuse_trials("cost table", [one.trial for one in mine]), rounds_inputs)


def find_model_ns(timings: Iterable[Timing]) -> int:
    """Return the whole dense model's time in ns: the median over all sweeps of its median in each."""
    trials = [one.trial for one in timings if one.subject == MODEL]
    valid = keep_valid(trials)
    if not valid:
        raise refuse_trials("cost table", trials)
    return round(median(median(trial.samples_ns) for trial in valid))


def price_layer(
    sites: Iterable[Site], shares: Mapping[Site, Estimate], offers: Mapping[Site, Iterable[Offer]], model_cost: int
) -> tuple[LayerCost, ...]:
    """Return a layer's row of the table: dense first, then the options offered at every site where it is called."""
    options: list[dict[Stored, Scaled]] = []
    for site in sites:
        share = shares[site]
        unit = max(share.value, 0.0) * model_cost
        scaled = {one.stored: _scale(one.ratio, unit) for one in offers.get(site, ())}
        options.append({Stored(): _scale(share, model_cost), **scaled})
    if not options:  # a layer that is never called
        return (LayerCost(factors=None, cost=0),)
    common = [one for one in options[0] if all(one in other for other in options)]
    return tuple(_add(stored, [one[stored] for one in options]) for stored in common)


def _scale(estimate: Estimate, unit: float) -> Scaled:
    low, high = estimate.low, estimate.high
    return estimate.value * unit, None if low is None else low * unit, None if high is None else high * unit


def _add(stored: Stored, costs: list[Scaled]) -> LayerCost:
    """Sum over a layer's calls; intervals are summed too, which errs on the wide side."""
    lows = [low for _, low, _ in costs if low is not None]
    highs = [high for _, _, high in costs if high is not None]
    return LayerCost(
        factors=stored.factors,
        weights=stored.weights,
        cost=max(1, round(sum(cost for cost, _, _ in costs))),  # a cost below the noise is still above zero
        low=round(sum(lows)) if len(lows) == len(costs) else None,
        high=round(sum(highs)) if len(highs) == len(costs) else None,
    )
