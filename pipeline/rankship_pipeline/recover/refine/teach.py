"""The loss of refinement: the squared distance of the student's logits from its teachers', all weighing the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.accuracy import predict
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.heads import open_logits

_SCALED_ON = 512  # inputs on which the variance of a teacher's logits is measured


@dataclass(frozen=True)
class Teacher:
    """A dense model and the variance of its logits, the unit of its errors."""

    model: nn.Module
    variance: float


def measure_teacher(model: nn.Module, inputs: Inputs) -> Teacher:
    """The model with its logits' variance over its own inputs, spread evenly."""
    step = -(-len(inputs[0]) // _SCALED_ON)
    logits = predict(model, tuple(tensor[::step] for tensor in inputs))
    return Teacher(model, float(logits[open_logits(logits)].var()))


def measure_loss(student: nn.Module, teachers: Sequence[Teacher], joined: Inputs, parts: Sequence[Inputs]) -> Tensor:
    """Mean over the teachers of the squared error over their variance, on the logits of each sample's own task.

    `joined` are the `parts` of all teachers, one after the other (see draw.draw_batches). Matrix products are in
    bfloat16 if the processor supports it.
    """
    products = torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())
    with torch.no_grad(), products:
        wanted = [teacher.model(*part).float() for teacher, part in zip(teachers, parts, strict=True)]
    with products:
        given = student(*joined).float().split([len(logits) for logits in wanted])
    errors = [
        (own - logits)[open_logits(logits)].square().mean() / teacher.variance
        for own, logits, teacher in zip(given, wanted, teachers, strict=True)
    ]
    return torch.stack(errors).mean()


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware: torch's emulation is slower than float32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
