"""Computes one layer's cost from sweeps in which it ran as several copies side by side.

One sweep is one process that runs within seconds: the whole dense model, the site's dense layer once and COPIES times,
and its options COPIES times each. With m, s, d and o their median times (or energies),

    layer = (d − s) / (COPIES − 1)        one dense layer, with the addition that joins it to the others
    overhead = s − layer                  reading the input and calling the runtime: paid once per inference
    option = (o − overhead) / COPIES      the same for a factored layer

A dense layer is given as a share of m, an option as a share of the dense layer in the same sweep, so that a slower
device cancels. Sweeps are the unit of independence: medians and intervals are over sweeps.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from rankship_benchmarks.costs.timings import Timing
from rankship_benchmarks.judge.validity import keep_valid, refuse_trials
from rankship_benchmarks.stats.estimates import Estimate, estimate_median, estimate_ratio
from rankship_pipeline.foundation.errors import RankshipError
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Factors, LayerCost
from rankship_pipeline.ranks.call_sites import Site

COPIES = 4
MODEL, SINGLE, DENSE = "model", "dense once", "dense"

BySweep = dict[int, float]
Scaled = tuple[float, float | None, float | None]  # a cost and its interval


@record
class Offer:
    """One way to store a site's layer and its cost as a share of the dense layer's."""

    factors: Factors
    ratio: Estimate


@dataclass(frozen=True)
class SiteCosts:
    """The costs of one site's subjects and of the whole model by sweep, in one unit, without what does not count.

    `refuse` makes the error for a site without costs: it names what did not count, and why.
    """

    costs: Mapping[str, BySweep]
    refuse: Callable[[], RankshipError]

    @property
    def dense(self) -> BySweep:
        """One dense layer's cost by sweep; may be at or below zero if the noise is larger."""
        single, several = self.costs.get(SINGLE, {}), self.costs.get(DENSE, {})
        return {sweep: (several[sweep] - single[sweep]) / (COPIES - 1) for sweep in single if sweep in several}

    def cost(self, subject: str) -> BySweep:
        """Return one layer's cost by sweep, for a subject (dense or factors)."""
        single, dense, taken = self.costs[SINGLE], self.dense, self.costs.get(subject, {})
        return {sweep: (taken[sweep] - (single[sweep] - dense[sweep])) / COPIES for sweep in taken if sweep in dense}

    def share(self) -> Estimate:
        """Return one dense layer's share of the whole dense model; raises `refuse()` without a sweep that has both."""
        model, dense = self.costs.get(MODEL, {}), self.dense
        shares = [dense[sweep] / model[sweep] for sweep in dense if sweep in model]
        if not shares:
            raise self.refuse()
        return estimate_median(shares)

    def ratio(self, factors: Factors) -> Estimate | None:
        """Return a factored layer's share of the dense one; None without a sweep that has both."""
        dense = {sweep: one for sweep, one in self.dense.items() if one > 0}
        return estimate_ratio(self.cost(str(factors)), dense)


def collect_times(timings: Iterable[Timing], site: str) -> SiteCosts:
    """Collect one site's median times in ns, without trials that do not count."""
    mine = [one for one in timings if one.site in {site, ""}]
    times: dict[str, BySweep] = {}
    for one in mine:
        if keep_valid([one.trial]):
            times.setdefault(one.subject, {})[one.sweep] = median(one.trial.samples_ns)
    return SiteCosts(times, lambda: refuse_trials("cost table", [one.trial for one in mine]))


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
    options: list[dict[Factors | None, Scaled]] = []
    for site in sites:
        share = shares[site]
        unit = max(share.value, 0.0) * model_cost
        scaled: dict[Factors | None, Scaled] = {one.factors: _scale(one.ratio, unit) for one in offers.get(site, ())}
        scaled[None] = _scale(share, model_cost)
        options.append(scaled)
    if not options:  # a layer that is never called
        return (LayerCost(factors=None, cost=0),)
    common = [None, *(one for one in options[0] if one is not None and all(one in other for other in options))]
    return tuple(_add(factors, [one[factors] for one in options]) for factors in common)


def _scale(estimate: Estimate, unit: float) -> Scaled:
    low, high = estimate.low, estimate.high
    return estimate.value * unit, None if low is None else low * unit, None if high is None else high * unit


def _add(factors: Factors | None, costs: list[Scaled]) -> LayerCost:
    """Sum over a layer's calls; intervals are summed too, which errs on the wide side."""
    lows = [low for _, low, _ in costs if low is not None]
    highs = [high for _, _, high in costs if high is not None]
    return LayerCost(
        factors=factors,
        cost=max(1, round(sum(cost for cost, _, _ in costs))),  # a cost below the noise is still above zero
        low=round(sum(lows)) if len(lows) == len(costs) else None,
        high=round(sum(highs)) if len(highs) == len(costs) else None,
    )
