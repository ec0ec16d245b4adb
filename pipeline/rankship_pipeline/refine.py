"""Label-free refinement: a compressed model trained for a stated time to say what the dense models say."""

import copy
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rankship_pipeline.data import Inputs
from rankship_pipeline.evaluate import predict

BATCH = 128
_PEAK_STEP = 3e-3  # Adam's step size at the top of the cycle (METHODS §1)

Augment = Callable[[Tensor, torch.Generator], Tensor]


def refine(
    student: nn.Module,
    teachers: Sequence[tuple[nn.Module, Inputs]],
    seconds: float,
    seed: int,
    *,
    augment: Augment | None = None,
    peak: float = _PEAK_STEP,
    clock: Callable[[], float] = time.monotonic,
) -> nn.Module:
    """A copy of the student after at most `seconds` of training towards each teacher's logits on its own inputs.

    The loss is the squared error of the logits over their variance, so that teachers of different scale weigh the
    same; Adam on a one-cycle schedule that runs by the clock, so a slower machine takes fewer steps and still ends at
    the bottom. Factors are balanced already (factorise.balance), which this needs. Batch-norm statistics follow the
    data; dropout stays off. No labels are read. `clock` gives seconds: of the wall, or of the processor
    (time.process_time) where other work shares the machine.
    """
    student = copy.deepcopy(student).eval()
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - torch's own common class
            module.train()
    generator = torch.Generator().manual_seed(seed)
    scales = [float(predict(teacher, inputs).var()) for teacher, inputs in teachers]
    optimizer = torch.optim.Adam(student.parameters(), lr=peak)
    start = clock()
    while (share := (clock() - start) / seconds) < 1:
        for (teacher, inputs), scale in zip(teachers, scales, strict=True):
            share = (clock() - start) / seconds
            picked = torch.randint(len(inputs[0]), (min(BATCH, len(inputs[0])),), generator=generator)
            batch = tuple(tensor[picked] for tensor in inputs)
            if augment is not None:
                batch = (augment(batch[0], generator), *batch[1:])
            with torch.no_grad():
                wanted = teacher(*batch)
            for group in optimizer.param_groups:
                group["lr"] = peak * _cycle(share)
            loss = (student(*batch) - wanted).square().mean() / scale
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return student.eval()


def flip_and_shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images (samples, channels, height, width) and move each by up to 4 pixels."""
    flipped = torch.rand(len(images), generator=generator) < 0.5  # noqa: PLR2004 - half
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    height, width = images.shape[2:]
    rows, columns = torch.randint(9, (2, len(images)), generator=generator)
    moved = [
        one[:, top : top + height, left : left + width]
        for one, top, left in zip(padded, rows.tolist(), columns.tolist(), strict=True)
    ]
    return torch.stack(moved)


AUGMENTS: dict[str, Augment | None] = {"none": None, "flip-and-shift": flip_and_shift}


def _cycle(share: float) -> float:
    """The one-cycle schedule (Smith 2018): up from 1/25 in the first 30 %, then down to nearly nothing, as cosines."""
    warm = 0.3
    if share < warm:
        return 0.04 + 0.96 * 0.5 * (1 - float(torch.cos(torch.tensor(torch.pi * share / warm))))
    return max(1e-4, 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, (share - warm) / (1 - warm)))))))
