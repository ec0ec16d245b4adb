"""The files that `rankship init` writes beside a recipe if the user names no model or no data; they run unchanged."""

DIGITS = '''"""A small network and scikit-learn's handwritten digits. Replace them with your own model and data."""

import torch
from torch import nn

TRAINING, CALIBRATION = 1200, 256  # of 1,797 samples; the rest after training are for testing


def make():
    """The untrained model: it takes images (batch, 1, 8, 8) and gives logits (batch, 10)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(64, 128, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )


def train(model, seed):
    """Train the model in place, in seconds. For weights of your own, write `weights` in the recipe, not `train`."""
    images, labels = _read()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(8):
        for batch in torch.randperm(TRAINING).split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()


def load():
    """Calibration inputs of every model, without labels; test inputs with labels. Tensors, samples first."""
    images, labels = _read()
    return {
        "calibration": {"digits": images[:CALIBRATION]},
        "test_inputs": images[TRAINING:],
        "test_labels": labels[TRAINING:],
    }


def _read():
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16, torch.tensor(digits.target)[order]
'''

# {name} is filled in
LOADER = '''"""Calibration and test data.

TODO: these are random numbers, so that the recipe can run before you have data; accuracy means nothing with them.
Load your own; some hundreds of samples each work well.
"""

import torch

SHAPE = (3, 224, 224)  # TODO: the shape of one sample of your model's input


def load(seed):
    """Calibration inputs of every model, without labels; test inputs with labels. Tensors, samples first."""
    generator = torch.Generator().manual_seed(seed)
    return {{
        "calibration": {{{name!r}: torch.randn(64, *SHAPE, generator=generator)}},
        "test_inputs": torch.randn(64, *SHAPE, generator=generator),
        "test_labels": torch.zeros(64, dtype=torch.int64),
    }}
'''

# One text per line, for a model that reads text; without labels, so that no accuracy is claimed for them.
SENTENCES = "\n".join(
    f"This is {kind} sentence number {number}, which stands where one of your own belongs."
    for number in range(1, 17)
    for kind in ("a short", "one more", "yet another", "an invented")
)
