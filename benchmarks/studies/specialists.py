"""ResNet-20 specialists, all fine-tuned from the published CIFAR-10 net: MNIST, Fashion-MNIST, and CIFAR-10 by halves.

Grey 28×28 images are padded to 32×32, repeated to three channels and normalised as CIFAR-10's are, so that all
specialists want their inputs alike. Images lie under the folder RANKSHIP_DATA.
"""

import json
from functools import cache

import cifar
import numpy as np
import torch
from evaluation_data import find_data
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

CALIBRATION_IMAGES = 500  # of each task's training images, chosen by the seed
TESTED = 2000  # of each task's test images, the first ones, so that every task weighs the same
HALVES = {"first": range(5), "second": range(5, 10)}  # classes of CIFAR-10
STEP_SIZE = 0.02  # of SGD at the top of its cycle; a head that starts at zero learns ten times as fast
BATCH = 128
EPOCHS = {"mnist": 4, "fashion": 6, "first": 4, "second": 4}

Labelled = tuple[Tensor, Tensor]


def train_mnist(module: nn.Module, seed: int) -> None:
    """Fine-tune on 6,000 labelled digits, with a head of its own."""
    _train(module, "mnist", seed)


def train_fashion(module: nn.Module, seed: int) -> None:
    """Fine-tune on 3,897 labelled pictures of clothes, with a head of its own."""
    _train(module, "fashion", seed)


def train_first(module: nn.Module, seed: int) -> None:
    """Fine-tune on the first five classes' 2,500 images; the head of all ten classes goes along."""
    _train(module, "first", seed)


def train_second(module: nn.Module, seed: int) -> None:
    """Fine-tune on the last five classes' 2,500 images; the head of all ten classes goes along."""
    _train(module, "second", seed)


def load_three(seed: int = 0) -> dict[str, object]:
    """CIFAR-10, MNIST and Fashion-MNIST, each with its own test images."""
    return _load(("cifar10", "mnist", "fashion"), seed)


def load_two(seed: int = 0) -> dict[str, object]:
    """CIFAR-10 and MNIST, each with its own test images."""
    return _load(("cifar10", "mnist"), seed)


def load_four(seed: int = 0) -> dict[str, object]:
    """CIFAR-10's halves, MNIST and Fashion-MNIST, each with its own test images."""
    return _load(("first", "second", "mnist", "fashion"), seed)


def load_halves(seed: int = 0) -> dict[str, object]:
    """CIFAR-10's halves with their own test images, and all ten classes' together: what one shared head must tell."""
    images, labels = _take(_read("cifar10", "test"), 2 * TESTED)
    return {**_load(("first", "second"), seed), "test_inputs": images, "test_labels": labels}


def _load(names: tuple[str, ...], seed: int) -> dict[str, object]:
    unlabelled = {name: _read(name, "train")[0] for name in names}
    calibration = {name: _draw(images, seed) for name, images in unlabelled.items()}
    tests = {name: _take(_read(name, "test"), TESTED) for name in names}
    return {"calibration": calibration, "unlabelled": unlabelled, "tests": tests}


def _draw(images: Tensor, seed: int) -> Tensor:
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_IMAGES]]


def _take(labelled: Labelled, count: int) -> Labelled:
    images, labels = labelled
    return images[:count], labels[:count]


def _train(module: nn.Module, name: str, seed: int) -> None:
    """SGD with momentum on one cycle, all layers; batch-norm statistics follow the data; bfloat16 products."""
    torch.manual_seed(seed)
    module.load_state_dict(load_file(find_data("cifar10_resnets/resnet20.safetensors")))
    head = module.get_submodule("linear")
    own_head = name not in HALVES
    if own_head:
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    images, labels = _read(name, "train")
    body = [one for part, one in module.named_parameters() if not part.startswith("linear.")]
    step_sizes = [STEP_SIZE, 10 * STEP_SIZE if own_head else STEP_SIZE]
    optimiser = torch.optim.SGD(
        [{"params": body}, {"params": head.parameters()}], lr=STEP_SIZE, momentum=0.9, weight_decay=5e-4
    )
    batches = [rows for _ in range(EPOCHS[name]) for rows in torch.randperm(len(images)).split(BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, step_sizes, total_steps=len(batches))
    module.train()
    for rows in batches:
        with torch.autocast("cpu", torch.bfloat16):
            logits = module(images[rows])
        loss = functional.cross_entropy(logits.float(), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    module.eval()


@cache
def _read(name: str, part: str) -> Labelled:
    """Normalised images (samples, 3, 32, 32) and classes (samples,) of the part "train" or "test".

    Channels lie last in memory: convolutions take two thirds of the time so.
    """
    if name in {"cifar10", *HALVES}:
        stored = {"train": "calib", "test": "test_A"}[part]
        listed = json.loads(find_data(f"cifar10/{stored}.json").read_text(encoding="utf-8"))["labels"]
        images, labels = _lay(cifar.read_images(stored)), torch.tensor(listed)
        if name in HALVES:
            mine = torch.isin(labels, torch.tensor(HALVES[name]))
            return images[mine], labels[mine]
        return images, labels
    folder = {"mnist": "mnist", "fashion": "fashion_mnist"}[name]
    kept = {"train": "calib", "test": "test"}[part]
    with np.load(find_data(f"{folder}/{folder}.npz")) as stored:
        pixels, labels = torch.from_numpy(stored[f"{kept}_x"]), torch.from_numpy(stored[f"{kept}_y"])
    padded = functional.pad(pixels, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
    return _lay(cifar.normalise(padded)), labels.to(torch.int64)


def _lay(images: Tensor) -> Tensor:
    return images.to(memory_format=torch.channels_last)
