"""Label-free refinement: a compressed model trained for a stated amount to say what the dense models say."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from rankship_pipeline.evaluate.accuracy import predict
from rankship_pipeline.evaluate.calibrate import find_mask
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.records import Refinement
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.heads import open_logits
from rankship_pipeline.models.weights import copy_state
from rankship_pipeline.recipe.choices import Augmentation, RefineChoice

BATCH = 128
_SCALED_ON = 512  # inputs of a teacher that its logits' variance is taken from

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Saving:
    """Where an unfinished refinement is kept, and how often; the same call goes on from there."""

    file: Path
    every_s: float = 60.0


def refine(
    student: nn.Module,
    teachers: Sequence[tuple[nn.Module, Inputs]],
    choice: RefineChoice,
    seed: int,
    *,
    clock: Callable[[], float] = time.process_time,
    saving: Saving | None = None,
    on_progress: Callable[[float], None] = lambda _share: None,
) -> tuple[nn.Module, Refinement]:
    """A copy of the student trained towards each teacher's logits on its own inputs, and what that took.

    Every batch holds as many samples of each teacher, so that batch-norm sees them mixed as it will in use. The loss is
    the squared error of the logits (of a sample's own task, see heads.py) over their variance, so that teachers of
    different scale weigh the same; Adam on a one-cycle schedule over the choice's `steps`, or by the clock (seconds of
    the processor: other work may share the machine), so that a slower machine takes fewer steps and still ends at the
    bottom. Factors are balanced already (factorise.balance), which this needs. Batch-norm statistics follow the data;
    dropout stays off. No labels are read. `steps` give the same bytes on every run, interrupted or not;
    `on_progress` gets the share that is done before each step. BuildError where the loss is no longer finite.
    """
    student = copy.deepcopy(student).eval()
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - torch's own common class
            module.train()
    generator = torch.Generator().manual_seed(seed)
    scales = [_measure_variance(teacher, inputs) for teacher, inputs in teachers]
    products = torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16())
    optimizer = torch.optim.Adam(student.parameters(), lr=choice.step_size)
    augment = AUGMENTS[choice.augment]
    done, spent = _go_on(saving, student, optimizer, generator)
    start, kept = clock(), time.monotonic()
    while (share := _measure_share(choice, done, spent + clock() - start)) < 1:
        on_progress(share)
        batches = [_draw(inputs, BATCH // len(teachers), augment, generator) for _, inputs in teachers]
        sizes = [len(batch[0]) for batch in batches]
        joined = _arrange(student, tuple(torch.cat(parts) for parts in zip(*batches, strict=True)))
        batches = list(zip(*(torch.split(tensor, sizes) for tensor in joined), strict=True))
        with torch.no_grad(), products:
            wanted = [teacher(*batch).float() for (teacher, _), batch in zip(teachers, batches, strict=True)]
        for group in optimizer.param_groups:
            group["lr"] = choice.step_size * _cycle(share)
        with products:
            said = student(*joined).float()
        errors = [
            (one - logits)[open_logits(logits)].square().mean() / scale
            for one, logits, scale in zip(said.split(sizes), wanted, scales, strict=True)
        ]
        loss = torch.stack(errors).mean()
        if not loss.isfinite():
            raise BuildError(f"refinement diverged at step {done}", hint="leave [refine] out, or allow a larger budget")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        done += 1
        if saving is not None and time.monotonic() - kept >= saving.every_s:
            _keep(saving.file, student, optimizer, generator, (done, spent + clock() - start))
            kept = time.monotonic()
    return student.eval(), Refinement(steps=done, cpu_seconds=spent + clock() - start, augment=choice.augment)


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself: torch's imitation would be slower than float32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def _measure_variance(teacher: nn.Module, inputs: Inputs) -> float:
    step = -(-len(inputs[0]) // _SCALED_ON)
    logits = predict(teacher, tuple(tensor[::step] for tensor in inputs))
    return float(logits[open_logits(logits)].var())


def _arrange(model: nn.Module, batch: Inputs) -> Inputs:
    """The same batch, faster: positions that hide in every sample cut off, images with their channels last."""
    mask = find_mask(model, batch)
    if mask is not None:
        width = int(mask.any(0).nonzero().max()) + 1
        return tuple(tensor[:, :width] if tensor.shape == mask.shape else tensor for tensor in batch)
    images = 4
    return tuple(
        tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == images else tensor for tensor in batch
    )


def _draw(inputs: Inputs, count: int, augment: Augment | None, generator: torch.Generator) -> Inputs:
    picked = torch.randint(len(inputs[0]), (max(1, min(count, len(inputs[0]))),), generator=generator)
    batch = tuple(tensor[picked] for tensor in inputs)
    return batch if augment is None else (augment(batch[0], generator), *batch[1:])


def _measure_share(choice: RefineChoice, done: int, spent: float) -> float:
    """How much of what the choice allows is used up."""
    return done / choice.steps if choice.steps is not None else spent / float(choice.cpu_seconds or 0)


def _keep(
    file: Path, student: nn.Module, optimizer: torch.optim.Adam, generator: torch.Generator, so_far: tuple[int, float]
) -> None:
    """Write everything that the next step depends on, in one rename."""
    tensors = {f"model/{name}": value for name, value in copy_state(student).items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{index}/{name}": value.clone() for name, value in moments.items()}
    tensors["generator"] = generator.get_state()
    tensors["so_far"] = torch.tensor(so_far, dtype=torch.float64)
    write_atomic(file, save(tensors))


def _go_on(
    saving: Saving | None, student: nn.Module, optimizer: torch.optim.Adam, generator: torch.Generator
) -> tuple[int, float]:
    """Steps and seconds of an interrupted refinement, its state restored; none where nothing was kept."""
    if saving is None or not saving.file.is_file():
        return 0, 0.0
    tensors = load(saving.file.read_bytes())  # bytes: the file is replaced while its tensors live
    student.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model/")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam/"):
            _, index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    generator.set_state(tensors["generator"])
    done, spent = tensors["so_far"].tolist()
    return int(done), spent


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


AUGMENTS: dict[Augmentation, Augment | None] = {"none": None, "flip-and-shift": flip_and_shift}


def _cycle(share: float) -> float:
    """The one-cycle schedule (Smith 2018): up from 1/25 in the first 30 %, then down to nearly nothing, as cosines."""
    warm = 0.3
    if share < warm:
        return 0.04 + 0.96 * 0.5 * (1 - float(torch.cos(torch.tensor(torch.pi * share / warm))))
    return max(1e-4, 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, (share - warm) / (1 - warm)))))))
