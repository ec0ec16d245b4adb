"""The properties of each rank allocation method, known before torch is imported."""

from typing import Literal

from rankship_pipeline.foundation.frozen import record

RankMethod = Literal["uniform", "arp", "strs", "ara", "ara-original", "knapsack"]


@record
class RankTraits:
    """The input and the limits of a method.

    `reads`: whitened spectra; the weights' own spectra as well; or the whole model, on which it trains masks.
    `any_unit`: it takes a budget in any unit, not only in parameters. `any_form`: it offers every form, not only the
    SVD. `own_step`: it ignores ranks.step, its ranks go down to 1.
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
