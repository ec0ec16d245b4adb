"""Measures layers changed alone, sample by sample; every pass begins at the changed layer wherever that is exact."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import predict, split
from rankship_pipeline.evaluate.likelihood import Likelihood, assume_logits, measure_scales, sum_nats, take_answers
from rankship_pipeline.evaluate.masks import Masks, find_masks
from rankship_pipeline.factors.analysis import Analysis
from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.records import Stored
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import get_layer, shape_weight
from rankship_pipeline.models.outputs import Outputs
from rankship_pipeline.models.restart import DivergedError, Restart, order_calls
from rankship_pipeline.quantise.chains import approximate

Changes = Mapping[str, Sequence[Stored]]  # what is measured of every layer
_BATCH = 32  # samples whose record is in memory
_TRIAL = 2  # samples on which restarted passes are compared with full ones
_CLOSE = 1e-4


@dataclass(frozen=True)
class Ratings:
    """Nats of every layer's changes, (changes, outputs, samples), and the samples' answers, (outputs, samples)."""

    nats: Mapping[str, Tensor]
    answers: Tensor

    def average(self, name: str, samples: slice = slice(None)) -> Tensor:
        """The divergence of a layer's changes on some samples, (changes,), as measure_divergence counts it."""
        counts = self.answers[:, samples].sum(-1).clamp_min(1)
        return (self.nats[name][..., samples].sum(-1) / counts).sum(-1)

    def add_samples(self, more: "Ratings") -> "Ratings":
        """With the same changes on further samples."""
        nats = {name: torch.cat([rows, more.nats[name]], -1) for name, rows in self.nats.items()}
        return Ratings(nats, torch.cat([self.answers, more.answers], -1))

    def add_changes(self, more: "Ratings") -> "Ratings":
        """With further changes on the same samples."""
        nats = {
            name: torch.cat([rows, more.nats[name]]) if name in more.nats else rows for name, rows in self.nats.items()
        }
        return Ratings(nats, self.answers)


@dataclass(frozen=True)
class Prober:
    """A model of which one layer at a time is changed, and the teacher's outputs on all samples.

    `restarts` are the layers at which a pass may begin, in the order of their first calls.
    """

    model: nn.Module
    analysis: Analysis
    inputs: Inputs
    teacher: Outputs
    likelihood: Likelihood
    scales: Outputs
    restarts: tuple[str, ...]

    def rate(self, changes: Changes, samples: slice) -> Ratings:
        """Measure every change, alone, on these samples."""
        names = list(self.likelihood)
        tensors = tuple(one[samples] for one in (*self.inputs, *(self.teacher[name] for name in names)))
        nats: dict[str, list[Tensor]] = {name: [] for name, some in changes.items() if some}
        answers = []
        for both in split(tensors, _BATCH):
            batch, expected = both[: len(self.inputs)], dict(zip(names, both[len(self.inputs) :], strict=True))
            masks = find_masks(self.model, batch)
            answers.append(_count_answers(expected, self.likelihood, masks))
            for name, rows in self._rate_batch(changes, batch, expected, masks, answers[-1]):
                nats[name].append(rows)
        return Ratings({name: torch.cat(parts, -1) for name, parts in nats.items()}, torch.cat(answers, -1))

    def _rate_batch(
        self, changes: Changes, batch: Inputs, expected: Outputs, masks: Masks, answers: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every layer's nats, (changes, outputs, samples); layers that restart come first, in order of calls."""
        full, restart = Restart(self.model, batch), Restart(self.model, batch)
        for name in dict.fromkeys((*self.restarts, *changes)):
            if not changes.get(name):
                continue
            passes = full
            if name in self.restarts:
                try:
                    restart.advance(
                        [get_layer(self.model, use.name) for use in self.analysis.layers.described[name].uses]
                    )
                    passes = restart
                except DivergedError:  # this batch takes another way through the model
                    passes = full
            rows = []
            with profile.layer(name), restoring(self.model, name):
                for change in changes[name]:
                    write(self.model, self.analysis, name, change)
                    found = passes.run()
                    rows.append(_rate_samples(found, expected, self.likelihood, self.scales, masks, answers))
            yield name, torch.stack(rows)


def prepare_prober(
    model: nn.Module,
    analysis: Analysis,
    names: Sequence[str],
    inputs: Inputs,
    likelihood: Likelihood | None,
) -> Prober:
    """A prober of these layers of the model, which is changed meanwhile and as before after; the analysis's teaches."""
    teacher = predict(analysis.model, inputs)
    likelihood = assume_logits(teacher) if likelihood is None else likelihood
    trial = tuple(tensor[:_TRIAL] for tensor in inputs)
    restarts = tuple(_find_restarts(model, analysis, names, trial))
    return Prober(model, analysis, inputs, teacher, likelihood, measure_scales([teacher], likelihood), restarts)


def _find_restarts(model: nn.Module, analysis: Analysis, names: Sequence[str], batch: Inputs) -> Iterator[str]:
    """Yield the layers at which a pass may begin: with the layer changed it gives what a full pass gives."""
    owners = {use.name: name for name in names for use in analysis.layers.described[name].uses}
    restart = Restart(model, batch)
    for name in dict.fromkeys(owners[use] for use in order_calls(model, list(owners), batch)):
        stops = [get_layer(model, use) for use, owner in owners.items() if owner == name]
        with restoring(model, name) as weight:
            if _is_exact(restart, Restart(model, batch), stops, weight):
                yield name


def _is_exact(restart: Restart, full: Restart, stops: Sequence[nn.Module], weight: Tensor) -> bool:
    """Whether a pass that begins at the stops gives what a full one gives, once the weight is changed."""
    try:
        restart.advance(stops)
        with torch.no_grad():
            weight.mul_(0.5)
        found = restart.run()
    except Exception:  # noqa: BLE001 - a model with a state of its own may raise anything
        return False
    return _is_close(found, full.run())


def _is_close(one: Outputs, other: Outputs) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name].double(), found, rtol=_CLOSE, atol=_CLOSE * float(found.abs().max()), equal_nan=True)
        for name in one
        for found in [other[name].double()]
    )


@torch.inference_mode()
def _rate_samples(
    found: Outputs, expected: Outputs, likelihood: Likelihood, scales: Outputs, masks: Masks, answers: Tensor
) -> Tensor:
    """The nats of every output on every sample, (outputs, samples), summed over the sample's `answers`."""
    rows = []
    taken = take_answers(found, expected, likelihood, masks)
    for (name, own, wanted), counts in zip(taken, answers.int().tolist(), strict=True):
        pairs = zip(torch.split(own, counts), torch.split(wanted, counts), strict=True)
        rows.append(torch.stack([sum_nats(mine, theirs, scales.get(name)).double() for mine, theirs in pairs]))
    return torch.stack(rows)


@torch.inference_mode()
def _count_answers(expected: Outputs, likelihood: Likelihood, masks: Masks) -> Tensor:
    """The number of answers of every output on every sample, (outputs, samples)."""
    counts = []
    for at in range(len(next(iter(expected.values())))):
        one = {name: expected[name][at : at + 1] for name in likelihood}
        shown = tuple(mask[at : at + 1] for mask in masks)
        counts.append([len(own) for _, own, _ in take_answers(one, one, likelihood, shown)])
    return torch.tensor(counts, dtype=torch.float64).T


@torch.no_grad()
def write(model: nn.Module, analysis: Analysis, name: str, stored: Stored) -> None:
    """Give a layer as its weight what it computes stored so."""
    taken = analysis.layers[name]
    matrix = taken.restore(approximate(taken, stored))
    weight = get_layer(model, name).weight
    weight.copy_(shape_weight(matrix, weight, taken.layer))


@contextmanager
def restoring(model: nn.Module, name: str) -> Iterator[Tensor]:
    """A layer's weight, which is as before when the context ends."""
    weight = get_layer(model, name).weight
    saved = weight.detach().clone()
    try:
        yield weight
    finally:
        with torch.no_grad():
            weight.copy_(saved)
