"""Five lines from a trained torch model to a file for a small device, and its time on this machine.

    python examples/quickstart.py

Trains a small network on scikit-learn's handwritten digits, keeps half of its parameters, exports it to ONNX, proves
that the file computes what torch computes, and measures it. `pip install 'rankship[onnx,demo]'` is all it needs.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import rankship as rs

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)
torch.manual_seed(0)
order = torch.randperm(len(images))
training, testing = order[:1400], order[1400:]

model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()),
    *(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10)),
)
optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(6):
    for batch in torch.split(training[torch.randperm(len(training))], 64):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()


if __name__ == "__main__":  # the five lines
    small = rs.compress(model, images[training[:256]], kept_parameters=0.5, test=(images[testing], labels[testing]))
    print(small.report())
    built = rs.export(small, "quickstart-out", formats="onnx")
    measured = rs.measure(built, on="this-machine")
    print(measured.report())
