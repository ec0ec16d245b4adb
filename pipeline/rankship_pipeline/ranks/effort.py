"""Decides whether effects on the predictions are measured, or estimated because measuring would take too long."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import call
from rankship_pipeline.ranks.sensitivity import PROBED_SHARES
from rankship_pipeline.ranks.stats import LayerStats
from rankship_pipeline.recipe.choices import RankChoice

# Floating-point operations: about an hour on two cores. A ResNet-50 stays below, a ViT-B/16 or BERT-base does not.
MOST_FLOPS = 2e14

Say = Callable[[str], None]


def choose_sensitivity(
    model: nn.Module, stats: Sequence[LayerStats], choice: RankChoice, probes: Inputs, say: Say
) -> RankChoice:
    """The choice, or above MOST_FLOPS the one with the second-order estimate, without passes around the plan.

    It says so in one line, and where there is no curvature to estimate from, what would make one.
    """
    if choice.sensitivity != "kl":
        return choice
    effort = count_effort(model, stats, choice, probes)
    if effort <= MOST_FLOPS:
        return choice
    found = f"measuring {len(stats)} layers' effect takes up to {effort:.0e} operations, more than {MOST_FLOPS:.0e}"
    if any(entry.nats is None for entry in stats):
        say(f"{found}; with curvature = true it would be estimated")
        return choice
    say(f'{found}: it is estimated to second order, as by sensitivity = "gradient"')
    return replace(choice, sensitivity="gradient", passes=0)


@torch.inference_mode()
def count_effort(model: nn.Module, stats: Sequence[LayerStats], choice: RankChoice, probes: Inputs) -> float:
    """The floating-point operations of measuring every layer on all probes; passes begin half-way on average."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call(model, tuple(tensor[:1] for tensor in probes))
    passes = len(stats) * len(PROBED_SHARES) * len(probes[0]) * (1 + choice.passes) / 2
    return passes * float(counter.get_total_flops())
