"""Pairs of specialists on scikit-learn's handwritten digits: 1,797 real scans of 8×8 pixels, ten classes.

Both models of a pair start from the same initialisation. One pair splits the kind of picture (ink and chalk), another
the classes (low and high); these share one head, so a merged model must know both. The third pair has different tasks,
each with its own head: which digit it is, and whether it is odd.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

TRAINING_SAMPLES = 1200  # of 1,797; the rest is the test set
CALIBRATION_SAMPLES = 256  # per specialist, taken from its training samples, labels unused
EPOCHS = 8


class Block(nn.Module):
    """A basic residual block of two 3×3 convolutions."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, h, w) to (batch, out, h / stride, w / stride)."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A small ResNet, 64 to 128 channels: wide enough that low rank pays on a CPU."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 64, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.blocks = nn.Sequential(Block(64, 64), Block(64, 128, 2), Block(128, 128))
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, classes)."""
        y = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.head(y.mean((2, 3)))


def make_resnet() -> nn.Module:
    """The untrained model; its initial weights follow torch's seed."""
    return DigitNet()


def make_parity() -> nn.Module:
    """The untrained model that tells even from odd; its backbone starts as make_resnet's."""
    return DigitNet(classes=2)


def train_ink(model: nn.Module, seed: int) -> None:
    """Train a specialist of dark ink on white paper."""
    images, labels = _read()
    _train(model, images[:TRAINING_SAMPLES], labels[:TRAINING_SAMPLES], seed + 1)


def train_chalk(model: nn.Module, seed: int) -> None:
    """Train a specialist of white chalk on a blackboard: the same scans as negatives."""
    images, labels = _read()
    _train(model, -images[:TRAINING_SAMPLES], labels[:TRAINING_SAMPLES], seed + 2)


def load_ink_and_chalk() -> dict[str, object]:
    """Calibration images of each specialist's own kind, all its training images without labels, and tests of both."""
    images, labels = _read()
    calibration, training, test = images[:CALIBRATION_SAMPLES], images[:TRAINING_SAMPLES], images[TRAINING_SAMPLES:]
    return {
        "calibration": {"ink": calibration, "chalk": -calibration},
        "unlabelled": {"ink": training, "chalk": -training},
        "tests": {"ink": (test, labels[TRAINING_SAMPLES:]), "chalk": (-test, labels[TRAINING_SAMPLES:])},
        "test_inputs": torch.stack([test, -test], 1).flatten(0, 1),
        "test_labels": labels[TRAINING_SAMPLES:].repeat_interleave(2),
    }


def train_low(model: nn.Module, seed: int) -> None:
    """Train a specialist of the digits 0 to 4."""
    images, labels = _read()
    mine = labels[:TRAINING_SAMPLES] < 5  # noqa: PLR2004
    _train(model, images[:TRAINING_SAMPLES][mine], labels[:TRAINING_SAMPLES][mine], seed + 1)


def train_high(model: nn.Module, seed: int) -> None:
    """Train a specialist of the digits 5 to 9."""
    images, labels = _read()
    mine = labels[:TRAINING_SAMPLES] > 4  # noqa: PLR2004
    _train(model, images[:TRAINING_SAMPLES][mine], labels[:TRAINING_SAMPLES][mine], seed + 2)


def load_low_and_high() -> dict[str, object]:
    """Calibration images of each specialist's own digits, and test images of all ten."""
    images, labels = _read()
    low = labels[:TRAINING_SAMPLES] < 5  # noqa: PLR2004
    training = images[:TRAINING_SAMPLES]
    return {
        "calibration": {"low": training[low][:CALIBRATION_SAMPLES], "high": training[~low][:CALIBRATION_SAMPLES]},
        "test_inputs": images[TRAINING_SAMPLES:],
        "test_labels": labels[TRAINING_SAMPLES:],
    }


def train_parity(model: nn.Module, seed: int) -> None:
    """Train a specialist that tells even (0) from odd (1) on a blackboard."""
    images, labels = _read()
    _train(model, -images[:TRAINING_SAMPLES], labels[:TRAINING_SAMPLES] % 2, seed + 2)


def load_digit_and_parity() -> dict[str, object]:
    """Calibration images, unlabelled training images and tests of both tasks: digits in ink, parity in chalk."""
    images, labels = _read()
    calibration, training, test = images[:CALIBRATION_SAMPLES], images[:TRAINING_SAMPLES], images[TRAINING_SAMPLES:]
    answers = labels[TRAINING_SAMPLES:]
    return {
        "calibration": {"digit": calibration, "parity": -calibration},
        "unlabelled": {"digit": training, "parity": -training},
        "tests": {"digit": (test, answers), "parity": (-test, answers % 2)},
    }


def _train(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=EPOCHS * -(-len(images) // 64))
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(64):
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = functional.cross_entropy(model(torch.roll(images[batch], shift, (2, 3))), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()


def _read() -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    digits = datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    return (images - 0.305) / 0.376, torch.tensor(digits.target, dtype=torch.int64)[order]
