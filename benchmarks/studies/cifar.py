"""CIFAR-10 ResNets of 20, 32 and 56 layers with parameter-free shortcuts; the weights are the recipes' `weights`.

The names of the tensors are those of akamaster/pytorch_resnet_cifar10; images lie under the folder RANKSHIP_DATA.
"""

import json

import numpy as np
import torch
from evaluation_data import find_data
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

CALIBRATION_IMAGES = 1000  # of 5,000 training images, chosen by the seed
STRIPS = 5  # of 1,000 images each, in one part
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class Shortcut(nn.Module):
    """Option A: every second pixel, new channels zero, half of them before and half behind the old."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.padding = (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h / 2, w / 2)."""
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose count of batches is no part of its state: the published files are older than that count."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("num_batches_tracked", torch.tensor(0), persistent=False)
        self.register_load_state_dict_pre_hook(_drop_count)


class Block(nn.Module):
    """A basic residual block of two 3×3 convolutions."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(channels_out)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h / stride, w / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, `blocks` in each: 6 · blocks + 2 layers."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = BatchNorm(16)
        self.layer1 = _make_stage(16, 16, 1, blocks)
        self.layer2 = _make_stage(16, 32, 2, blocks)
        self.layer3 = _make_stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (batch, 3, 32, 32) to logits (batch, 10)."""
        y = self.layer1(functional.relu(self.bn1(self.conv1(x))))
        return self.linear(self.layer3(self.layer2(y)).mean((2, 3)))


def resnet20() -> nn.Module:
    """The untrained ResNet-20; its weights are cifar10_resnets/resnet20.safetensors."""
    return ResNet(3)


def resnet32() -> nn.Module:
    """The untrained ResNet-32; its weights are cifar10_resnets/resnet32.safetensors."""
    return ResNet(5)


def resnet56() -> nn.Module:
    """The untrained ResNet-56; its weights are cifar10_resnets/resnet56.safetensors."""
    return ResNet(9)


def load_resnet20(seed: int = 0) -> dict[str, object]:
    """Calibration images of ResNet-20 by seed, and the 5,000 test images of part A."""
    return _load("resnet20", seed)


def load_resnet32(seed: int = 0) -> dict[str, object]:
    """Calibration images of ResNet-32 by seed, and the 5,000 test images of part A."""
    return _load("resnet32", seed)


def load_resnet56(seed: int = 0) -> dict[str, object]:
    """Calibration images of ResNet-56 by seed, and the 5,000 test images of part A."""
    return _load("resnet56", seed)


def load_unlabelled() -> Tensor:
    """All 5,000 training images at hand, for refinement without labels: (5000, 3, 32, 32)."""
    return read_images("calib")


def read_images(part: str) -> Tensor:
    """Normalised images (5000, 3, 32, 32) of a part, stored as PNG strips: one image under the other."""
    strips = []
    for number in range(STRIPS):
        with Image.open(find_data(f"cifar10/{part}_{number:02}.png")) as strip:
            strips.append(np.asarray(strip.convert("RGB")).reshape(-1, 32, 32, 3))
    return normalise(torch.from_numpy(np.concatenate(strips)).permute(0, 3, 1, 2))


def normalise(pixels: Tensor) -> Tensor:
    """Bytes (samples, 3, 32, 32) as the published nets want them."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return ((pixels.to(torch.float32) / 255 - mean) / deviation).contiguous()


def _drop_count(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    state.pop(f"{prefix}num_batches_tracked", None)  # torch itself adds it to a state that lacks it


def _make_stage(channels_in: int, channels_out: int, stride: int, blocks: int) -> nn.Sequential:
    rest = (Block(channels_out, channels_out, 1) for _ in range(blocks - 1))
    return nn.Sequential(Block(channels_in, channels_out, stride), *rest)


def _load(name: str, seed: int) -> dict[str, object]:
    images = load_unlabelled()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_IMAGES]
    labels = json.loads(find_data("cifar10/test_A.json").read_text(encoding="utf-8"))["labels"]
    return {
        "calibration": {name: images[chosen]},
        "unlabelled": {name: images},
        "test_inputs": read_images("test_A"),
        "test_labels": torch.tensor(labels),
    }
