"""The loss of refinement: the squared distance of the student's outputs from its teachers', all weighing the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import fit_outputs, predict
from rankship_pipeline.evaluate.likelihood import Answer, Likelihood, assume_logits, measure_scales
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.heads import open_logits
from rankship_pipeline.models.outputs import Outputs, call
from rankship_pipeline.recover.refine.draw import BATCH

_SCALED_ON = 512  # inputs on which the variance of a teacher's outputs is measured
# Of a batch, of which a step holds several: a language model's outputs are far larger than all else.
OUTPUT_BYTES = 2**28


@dataclass(frozen=True)
class Teacher:
    """A dense model, how its outputs are distributed, and the variance of each: the unit of its errors.

    `batch` is the number of samples whose outputs fit in memory, several times over.

    Classes' scores have one variance (), other numbers one for each column, shaped to fit the output.
    """

    model: nn.Module
    likelihood: Likelihood
    variances: Outputs
    batch: int


def measure_teacher(model: nn.Module, inputs: Inputs, likelihood: Likelihood | None = None) -> Teacher:
    """The model with its outputs' variances over its own inputs, spread evenly; without a likelihood all are logits."""
    batch = fit_outputs(predict(model, tuple(tensor[:1] for tensor in inputs)), BATCH, OUTPUT_BYTES)
    step = -(-len(inputs[0]) // min(_SCALED_ON, 4 * batch))
    outputs = predict(model, tuple(tensor[::step] for tensor in inputs))
    likelihood = assume_logits(outputs) if likelihood is None else likelihood
    scales = measure_scales([outputs], likelihood)
    variances = {}
    for name, answer in likelihood.items():
        if answer.is_choice:
            variances[name] = outputs[name][open_logits(outputs[name])].var()
        else:
            variances[name] = _spread(scales[name].square().float(), outputs[name], answer)
    return Teacher(model, likelihood, variances, batch)


def _spread(columns: Tensor, output: Tensor, answer: Answer) -> Tensor:
    """One number a column in a shape that multiplies the output."""
    if output.ndim == 1:
        return columns
    shape = [1] * output.ndim
    shape[answer.axis] = len(columns)
    return columns.view(shape)


def measure_loss(student: nn.Module, teachers: Sequence[Teacher], joined: Inputs, parts: Sequence[Inputs]) -> Tensor:
    """Mean over the teachers of the squared error over their variance, on the outputs of each sample's own task.

    Several outputs add up. `joined` are the `parts` of all teachers, one after the other (see draw.draw_batches).
    Matrix products are in bfloat16 if the processor supports it.
    """
    with torch.no_grad(), products():
        wanted = [call(teacher.model, part) for teacher, part in zip(teachers, parts, strict=True)]
    with products():
        found = call(student, joined)
    sizes = [len(part[0]) for part in parts]
    given = {name: torch.split(found[name].float(), sizes) for name in teachers[0].likelihood}
    errors = [
        _add_up(teacher, {name: parts[place] for name, parts in given.items()}, outputs)
        for place, (teacher, outputs) in enumerate(zip(teachers, wanted, strict=True))
    ]
    return torch.stack(errors).mean()


def _add_up(teacher: Teacher, given: Outputs, wanted: Outputs) -> Tensor:
    """The squared errors over the variances of all outputs of one teacher's samples."""
    errors = []
    for name, answer in teacher.likelihood.items():
        own, logits, variance = given[name], wanted[name].float(), teacher.variances[name]
        if answer.is_choice:
            errors.append((own - logits)[open_logits(logits)].square().mean() / variance)
        else:
            columns = min(variance.shape[-1], own.shape[-1])  # fewer positions where all samples are padded
            errors.append(((own - logits).square() / variance[..., :columns]).mean())
    return torch.stack(errors).sum()


def products() -> torch.autocast:
    """Where matrix products are in bfloat16 if the processor supports it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware: torch's emulation is slower than float32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
