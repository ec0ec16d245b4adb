"""What each method of rank allocation can be asked for, known before torch is imported."""

from typing import Literal

from rankship_pipeline.foundation.records import record

RankMethod = Literal["uniform", "arp", "strs", "ara", "ara-original", "knapsack"]


@record
class RankTraits:
    """What a method reads and takes.

    `reads`: whitened spectra, the weights' own spectra too, or the whole model, which it trains masks on.
    `any_unit`: it takes a budget in any unit, not in parameters only. `any_form`: it knows every form, not the SVD
    only. `own_step`: its ranks are its own, down to 1, whatever ranks.step says.
    """

    reads: Literal["spectra", "weights", "model"] = "spectra"
    any_unit: bool = False
    any_form: bool = False
    own_step: bool = False


RANK_METHODS: dict[RankMethod, RankTraits] = {
    "uniform": RankTraits(any_unit=True, any_form=True),
    "arp": RankTraits(reads="weights", own_step=True),
    "strs": RankTraits(any_unit=True, any_form=True),
    "ara": RankTraits(reads="model"),
    "ara-original": RankTraits(reads="model"),
    "knapsack": RankTraits(any_unit=True, any_form=True),
}
