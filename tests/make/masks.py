"""Masks of ARA over layers and spectra made on the spot."""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from rankship_pipeline.factors.decompose import Spectrum, decompose_plain
from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks import ara
from rankship_pipeline.ranks.ara import AraChoice, Mask
from rankship_pipeline.ranks.stats import LayerStats, Offer

ORIGINAL, REPAIRED = AraChoice(repaired=False), AraChoice(repaired=True)


def make_layer_stats(layer: Layer, energy: Tensor, step: int = 1) -> LayerStats:
    """A layer as allocation knows it, whose components carry these energies."""
    total = float(energy.sum())
    candidates = tuple(
        Offer(Stored(factors=Factors(rank=k)), layer.count_factored(k), float(energy[k:].sum()) / total)
        for k in range(step, min(layer.rows, layer.columns) + 1, step)
        if layer.count_factored(k) < layer.parameters
    )
    return LayerStats(layer=layer, plain=energy.numpy(), energy=energy.numpy(), candidates=candidates)


def make_spectrum(rows: int, columns: int, seed: int = 0) -> Spectrum:
    """The spectrum of a random matrix."""
    generator = torch.Generator().manual_seed(seed)
    return decompose_plain(torch.randn(rows, columns, generator=generator, dtype=torch.float64), None)


def with_logits(mask: Mask, logits: Tensor) -> Mask:
    """The same mask with these logits."""
    return replace(mask, logits=logits.clone().requires_grad_())


def with_ratio(mask: Mask, ratio: float) -> Mask:
    """The same mask at this share of its layer."""
    return replace(mask, logits=ara.start_logits(mask.c, ratio / mask.stretch).requires_grad_())


def find_gradient(value: Tensor, mask: Mask) -> Tensor:
    """What a value says of a mask's logits, zeros where it says nothing."""
    if not value.requires_grad:
        return torch.zeros_like(mask.logits)
    (gradient,) = torch.autograd.grad(value, mask.logits, allow_unused=True)
    return torch.zeros_like(mask.logits) if gradient is None else gradient


shapes = st.tuples(st.integers(3, 40), st.integers(3, 40))


@st.composite
def logits_of_any_kind(draw: st.DrawFn) -> Tensor:
    """From all alike to nearly one candidate alone (101,)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.randn(101, generator=generator, dtype=torch.float64) * draw(
        st.sampled_from([0.0, 0.1, 1.0, 8.0, 50.0])
    )
