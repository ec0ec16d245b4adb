"""Saves a running refinement to a file, with everything that its next step depends on, and restores it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.models.weights import copy_state


@dataclass
class Training:
    """A student, its optimizer, its random generator, the steps and seconds done so far, and the block in training."""

    student: nn.Module
    optimizer: torch.optim.Adam
    generator: torch.Generator
    steps: int = 0
    cpu_seconds: float = 0.0
    block: int = 0


def keep(training: Training, file: Path) -> None:
    """Write the training to the file in one rename."""
    tensors = {f"model/{name}": value for name, value in copy_state(training.student).items()}
    for index, moments in training.optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{index}/{name}": value.clone() for name, value in moments.items()}
    tensors["generator"] = training.generator.get_state()
    tensors["so_far"] = torch.tensor((training.steps, training.cpu_seconds, training.block), dtype=torch.float64)
    write_atomic(file, save(tensors))


def restore(training: Training, file: Path) -> None:
    """Set a new training to the state that `keep` wrote."""
    tensors = load(file.read_bytes())  # as bytes: the file is replaced while its tensors are in use
    training.student.load_state_dict(
        {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam/"):
            _, index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    training.generator.set_state(tensors["generator"])
    steps, training.cpu_seconds, block = tensors["so_far"].tolist()
    training.steps, training.block = int(steps), int(block)
