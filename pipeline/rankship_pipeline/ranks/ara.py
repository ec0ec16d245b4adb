"""Adaptive rank allocation (ARA, arXiv 2510.19389): learns each layer's rank through a staircase mask.

A layer's mask is a distribution α over D + 1 retention ratios c = (1, 1 − 1/D, …, 0) of its first K singular values.
Only the mask logits are trained; the weights are frozen and the given model is not changed. The result is a parameter
ratio for every layer, which `finalise` turns into ranks.

`AraChoice.repaired` is False for the method as published, with its known defects: a layer that has become dense gets no
gradient any more, K may exceed the full rank, the guidance loss outweighs the size loss, and the plan may miss the
budget. True corrects all four.
"""

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankship_pipeline.evaluate.accuracy import IGNORED
from rankship_pipeline.evaluate.calibrate import find_scales, predict
from rankship_pipeline.evaluate.likelihood import Likelihood, sum_nats, take_answers
from rankship_pipeline.evaluate.masks import find_mask, find_masks
from rankship_pipeline.factors.decompose import Spectrum, truncate
from rankship_pipeline.factors.rebuild import Chain, fill_factors, make_chains
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Factorable, find_ties, get_layer
from rankship_pipeline.models.outputs import flatten
from rankship_pipeline.ranks.allocators import spend_remainder, total_cost
from rankship_pipeline.ranks.stats import Choices, LayerStats

Tick = Callable[[int, int], None]

DENSE_RATIO = 0.99  # a layer that keeps this share of its parameters stays dense
STRETCH = 1.2  # the published K / k*: above 1, so that a mask can mean "dense"
SMALLEST_RATIO = 1e-6  # a layer with a smaller ratio may stay at its smallest candidate


@record
class AraChoice:
    """The published settings: batches of one, 10 epochs of 256 samples; `candidates` is D, the weights the losses'."""

    steps: int = 2560
    learning_rate: float = 1e-3
    candidates: int = 100
    size_weight: float = 100.0
    guidance_weight: float = 50.0
    batch: int = 1
    repaired: bool = True


@dataclass(frozen=True)
class Task:
    """The training task of the masked model; `loss` takes its outputs for a batch and that batch's sample indices."""

    inputs: Inputs
    loss: Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Mask:
    """One layer's learned mask; `stretch` is R/r, `errors` is e_l for every number of kept components, 0 … K."""

    logits: Tensor  # (D + 1,)
    c: Tensor  # (D + 1,)
    M: Tensor  # (D + 1, K)
    errors: Tensor  # (K + 1,)
    stretch: float
    parameters: int

    def find_retention(self) -> Tensor:
        """The retention r = cᵀα with α = softmax(logits): the expected share of the K components."""
        return self.c @ self.logits.softmax(0)

    def find_ratio(self) -> Tensor:
        """R = (K/k*)·r: parameters of the masked factors over those of the dense layer; dense from 1 on."""
        return self.stretch * self.find_retention()

    def count_kept(self) -> int:
        """The number of components that the hard mask keeps: round(K·r)."""
        return round(self.M.shape[1] * float(self.find_retention().detach()))

    def draw(self) -> Tensor:
        """The mask m = h − sg(p) + p (K,): the hard mask forward, the soft one p = αᵀM backward."""
        p = self.logits.softmax(0) @ self.M
        h = (torch.arange(len(p)) < self.count_kept()).to(p.dtype)
        return h - p.detach() + p


class Masked(nn.Module):
    """Replaces one layer while its mask is learned: W_u((W_v x) ⊙ m) + b while R < 1, dense from R = 1 on.

    Repaired, the dense state takes its value and the gradient of its input from the dense weight and the gradient of
    its mask from the factors, so that the task loss still trains the mask.
    """

    def __init__(self, dense: Factorable, factors: Chain, mask: Mask, *, repaired: bool) -> None:
        super().__init__()
        self.dense, self.mask, self.repaired = dense, mask, repaired
        self.inwards, self.outwards = factors
        # a convolution's channels are before its positions, other layers' features last
        self.shape = (-1, *(1 for _ in getattr(dense, "kernel_size", ())))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - callers may name it, as torch's own layers do
        """Map the layer's input to its output."""
        if self.mask.find_ratio() < 1:
            return self._factor(input)
        y: Tensor = self.dense(input)
        if not self.repaired:
            return y
        factored = self._factor(input.detach())
        return y + (factored - factored.detach())

    def _factor(self, x: Tensor) -> Tensor:
        m = self.mask.draw().to(self.dense.weight.dtype)
        y: Tensor = self.outwards(self.inwards(x) * m.reshape(self.shape))
        return y


def match_targets(inputs: Inputs, targets: Tensor) -> Task:
    """Cross-entropy, the published loss, on targets (samples,) or (samples, positions); IGNORED does not count."""

    def loss(outputs: Tensor, picked: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.flatten(0, -2), targets[picked].flatten(), ignore_index=IGNORED)

    return Task(inputs=inputs, loss=loss)


def match_next(model: nn.Module, inputs: Inputs) -> Task:
    """Cross-entropy on the inputs' own next tokens (samples, positions), for a language model; needs no labels."""
    mask = find_mask(model, inputs)
    tokens = inputs[0] if mask is None else inputs[0].masked_fill(~mask, IGNORED)
    return match_targets(inputs, functional.pad(tokens[:, 1:], (0, 1), value=IGNORED))


def match_outputs(model: nn.Module, inputs: Inputs, likelihood: Likelihood | None = None) -> Task:
    """Mean divergence from the dense model's own outputs, distributed by the `likelihood` (None: all hold logits).

    Replaces the published cross-entropy for data without labels, such as the pipeline's calibration data.
    """
    dense = copy.deepcopy(model).eval()
    known, scales = find_scales(dense, inputs, likelihood)
    teacher = {name: one.clone() for name, one in predict(dense, inputs).items()}
    masks = find_masks(model, inputs)

    def loss(outputs: object, picked: Tensor) -> Tensor:
        wanted = {name: one[picked] for name, one in teacher.items()}
        pairs = take_answers(flatten(outputs), wanted, known, tuple(one[picked] for one in masks))
        return torch.stack([sum_nats(own, one, scales.get(name)) / max(1, len(own)) for name, own, one in pairs]).sum()

    return Task(inputs=inputs, loss=loss)


def train_ratios(
    model: nn.Module,
    spectra: Mapping[str, Spectrum],
    task: Task,
    kept: float,
    choice: AraChoice,
    seed: int,
    tick: Tick,
) -> dict[str, float]:
    """Learn every layer's ratio of parameters R_l so that the layers of `spectra` together keep the share `kept`.

    The size is met approximately. Layers that no rank makes cheaper stay at 1. `tick` gets (done, total) after each
    step. The seed orders the samples; nothing else is random.
    """
    parameters = {name: prod(_shape(spectrum)) for name, spectrum in spectra.items()}
    masks = {
        name: make_mask(spectrum, kept, choice)
        for name, spectrum in spectra.items()
        if kept < 1 and sum(_shape(spectrum)) < parameters[name]
    }
    if not masks:
        return dict.fromkeys(spectra, 1.0)
    masked = attach(model, spectra, masks, repaired=choice.repaired)
    optimizer = torch.optim.AdamW([mask.logits for mask in masks.values()], lr=choice.learning_rate)
    for done, picked in enumerate(_draw_batches(len(task.inputs[0]), choice, seed), start=1):
        task_loss = task.loss(masked(*(tensor[picked] for tensor in task.inputs)), picked)
        optimizer.zero_grad()
        torch.autograd.backward(task_loss + measure_penalty(masks, kept, sum(parameters.values()), choice))
        optimizer.step()
        tick(done, choice.steps)
    return {name: float(masks[name].find_ratio().detach()) if name in masks else 1.0 for name in spectra}


def make_mask(spectrum: Spectrum, kept: float, choice: AraChoice) -> Mask:
    """A mask whose ratio R starts at `kept`; with k* = mn/(m + n), the rank at which factors cost as much as dense.

    K = ⌈1.2·k*⌉ and R = 1.2·r as published; repaired, K is at most min(m, n) and R = (K/k*)·r, so that a ratio always
    equals the parameters of the kept components.
    """
    rows, columns = _shape(spectrum)
    break_even = rows * columns / (rows + columns)
    K = ceil(STRETCH * break_even)
    K = min(K, rows, columns) if choice.repaired else K
    stretch = K / break_even if choice.repaired else STRETCH
    c = list_candidates(choice.candidates)
    return Mask(
        logits=start_logits(c, kept / stretch).requires_grad_(),
        c=c,
        M=build_staircase(K, choice.candidates),
        errors=measure_errors(spectrum, K),
        stretch=stretch,
        parameters=rows * columns,
    )


def list_candidates(D: int) -> Tensor:
    """The retention ratios c = (1, 1 − 1/D, …, 0), float64."""
    return torch.arange(D, -1, -1, dtype=torch.float64) / D


def build_staircase(K: int, D: int) -> Tensor:
    """M (D + 1, K) with M[i, j] = 1 iff j < int(K·c_i), in whole numbers: c_i is (D − i)/D."""
    steps = K * torch.arange(D, -1, -1) // D
    return (torch.arange(K) < steps[:, None]).to(torch.float64)


def start_logits(c: Tensor, t: float) -> Tensor:
    """Logits δ on A = {c_i ≥ t} and 0 on the rest B, with δ = ln[(S_B − t·n_B)/(t·n_A − S_A)]: E[r] = t, 0 < t < 1."""
    above = c >= t
    n_A, S_A = int(above.sum()), float(c[above].sum())
    n_B, S_B = len(c) - n_A, float(c[~above].sum())
    return log((S_B - t * n_B) / (t * n_A - S_A)) * above.to(torch.float64)


def measure_errors(spectrum: Spectrum, K: int) -> Tensor:
    """E for k = 0 … K: √(Σ_{j>k} σ_j² / Σ σ_j²), the relative output error of the first k components."""
    energy = torch.zeros(max(K, len(spectrum.sigma)), dtype=torch.float64)
    energy[: len(spectrum.sigma)] = spectrum.energy
    tails = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    return (tails / tails[0].clamp_min(1e-300)).sqrt()[: K + 1]


def attach(
    model: nn.Module, spectra: Mapping[str, Spectrum], masks: Mapping[str, Mask], *, repaired: bool
) -> nn.Module:
    """A frozen copy of the model with a Masked layer for each that has a mask, and for each that is tied to it."""
    masked = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
    chains = make_chains(masked, {name: Factors(rank=mask.M.shape[1]) for name, mask in masks.items()})
    owners = {other: name for name, others in find_ties(masked).items() for other in others}
    for name, mask in masks.items():
        W_u, W_v = truncate(spectra[name], mask.M.shape[1])  # (rows, K), (K, columns); zeros beyond the spectrum
        fill_factors(chains[name], (W_v, W_u))
    for name, factors in chains.items():
        parent, _, child = name.rpartition(".")
        factors.requires_grad_(requires_grad=False)
        layer = Masked(get_layer(masked, name), factors, masks[owners.get(name, name)], repaired=repaired)
        setattr(masked.get_submodule(parent), child, layer)
    return masked


def measure_penalty(masks: Mapping[str, Mask], kept: float, total: int, choice: AraChoice) -> Tensor:
    """The two losses beside the task's: 100·(R_eff − R_t)² and 50 times the guidance.

    As published the guidance outweighs the size: the size settles above its target, and every dense layer stays at
    R = 1, so that their ratios do not differ. Repaired, the guidance is off while the size is above its target.
    """
    size = measure_size(list(masks.values()), total, repaired=choice.repaired)
    penalty = choice.size_weight * (size - kept) ** 2
    if choice.repaired and float(size.detach()) > kept:
        return penalty
    return penalty + choice.guidance_weight * measure_guidance(list(masks.values()))


def measure_size(masks: Sequence[Mask], total: int, *, repaired: bool) -> Tensor:
    """R_eff = Σ P_l·min(R_l, 1) / Σ P_l over `total` parameters; layers without a mask count as dense.

    Repaired, the gradient passes through the minimum, so that a size above the target reduces dense layers too.
    """
    size = torch.tensor(total - sum(mask.parameters for mask in masks), dtype=torch.float64)
    for mask in masks:
        R = mask.find_ratio()
        capped = R.clamp(max=1)
        size = size + mask.parameters * (R - (R - capped).detach() if repaired else capped)
    return size / total


def measure_guidance(masks: Sequence[Mask]) -> Tensor:
    """Mean over the layers of (1 − R)·1{R > 1 − e(R)}: if size and error together exceed 1, dense is better."""
    terms = []
    for mask in masks:
        R = mask.find_ratio()
        fires = float(R.detach()) + float(mask.errors[mask.count_kept()]) > 1
        terms.append((1 - R.clamp(max=1)) * fires)
    return torch.stack(terms).mean()


def _draw_batches(samples: int, choice: AraChoice, seed: int) -> Iterator[Tensor]:
    """Indices of `choice.steps` batches; every epoch has all samples in a new order."""
    generator = torch.Generator().manual_seed(seed)
    left = choice.steps
    while left > 0:
        order = torch.randperm(samples, generator=generator)
        for start in range(0, samples, choice.batch)[:left]:
            left -= 1
            yield order[start : start + choice.batch]


def _shape(spectrum: Spectrum) -> tuple[int, int]:
    return spectrum.U.shape[0], spectrum.right.shape[1]


def finalise(ratios: Mapping[str, float], stats: Sequence[LayerStats], available: int, *, repaired: bool) -> Choices:
    """How each layer is stored so that all cost `available` parameters: R ≥ .99 dense, the others scaled to fit.

    As published (its step Finalise) the plan may exceed the budget: if dense layers use it up, the others still get
    their smallest candidate. Repaired, it never does (budget.check_feasible runs first), and the remainder is too small
    for any further step.
    """
    dense = {entry.layer.name for entry in stats if not entry.candidates or ratios[entry.layer.name] >= DENSE_RATIO}
    if repaired:
        return spend_remainder(stats, _demote(ratios, stats, dense, available), available)
    left = available - sum(entry.layer.parameters for entry in stats if entry.layer.name in dense)
    wanted = sum(_find_wanted(ratios, entry) for entry in stats if entry.layer.name not in dense)
    return _scale(ratios, stats, dense, left / wanted if wanted else 0.0)


def _demote(ratios: Mapping[str, float], stats: Sequence[LayerStats], dense: set[str], available: int) -> Choices:
    """The plan of smallest summed error share among those that factor the 0, 1, 2, … dense layers of lowest ratio.

    A repaired dense layer's ratio still follows the losses, so it ranks what each gains by being dense. The errors
    decide how many to factor: too few leave no budget for the others, too many ignore what was learned.
    """
    weakest = [entry.layer.name for entry in stats if entry.candidates and entry.layer.name in dense]
    weakest.sort(key=lambda name: ratios[name])
    plans = [_bisect(ratios, stats, dense.difference(weakest[:count]), available) for count in range(len(weakest) + 1)]
    fitting = [plan for plan in plans if total_cost(stats, plan) <= available] or plans[-1:]
    return min(fitting, key=lambda plan: sum(entry.predict_error(plan[entry.layer.name]) for entry in stats))


def _bisect(ratios: Mapping[str, float], stats: Sequence[LayerStats], dense: set[str], available: int) -> Choices:
    """Scale the ratios outside `dense` up as far as fits; the smallest candidates if nothing fits."""
    low, high = 0.0, 1 / max(min(ratios.values()), SMALLEST_RATIO)
    for _ in range(60):  # down to float resolution
        middle = (low + high) / 2
        fits = total_cost(stats, _scale(ratios, stats, dense, middle)) <= available
        low, high = (middle, high) if fits else (low, middle)
    return _scale(ratios, stats, dense, low)


def _scale(ratios: Mapping[str, float], stats: Sequence[LayerStats], dense: set[str], scale: float) -> Choices:
    """For layers outside `dense` the largest candidate within scale·R·P parameters, at least the smallest."""
    chosen: Choices = {}
    for entry in stats:
        fitting = bisect_right(entry.candidates, scale * _find_wanted(ratios, entry), key=lambda one: one.cost)
        name = entry.layer.name
        chosen[name] = entry.full if name in dense else entry.candidates[max(0, fitting - 1)].stored
    return chosen


def _find_wanted(ratios: Mapping[str, float], entry: LayerStats) -> float:
    """R·P: the parameters that training found for a layer."""
    return ratios[entry.layer.name] * entry.layer.parameters
